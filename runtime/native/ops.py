"""``nm::packed_linear`` and ``nm::packed_conv2d``: products with packed N:M weights on the CPU, epilogues included.

    y = activation(x W^T + bias + residual)        in one pass: bias when sums start, the rest when they are written

x is float32 (bfloat16 and float16 are converted there and back); sums are float32. Up to `FEW` tokens a linear reads every
weight once and leaves x where it is; beyond that x is packed into panels, stays as it is, or both (few.h; panel.h, lanes.h and
mixed.h). Results of convolutions have the memory format of x. A position that was pruned is not read: where a dense product
makes 0 * inf = NaN of it, this one does not. Inference only: there is no gradient.

They are defined without `torch.library.custom_op`, whose wrapper takes longer than a small product.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.native.job import ACTIVATIONS, DTYPES, Job, address
from nm_compiler.runtime.native.library import Library, load
from nm_compiler.runtime.native.packing import LANES, sizes
from nm_compiler.wording import shown

FEW = 24
"""Tokens up to which the weights' way through memory is what takes time."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Of x and of what is added."""

_ops = torch.library.Library("nm", "FRAGMENT")
_TAIL = "Tensor values, Tensor codes, Tensor? scales, Tensor? bias, Tensor? residual, int[] pattern, int rows"
_ops.define(f"packed_linear(Tensor x, {_TAIL}, str activation) -> Tensor")
_ops.define(
    f"packed_conv2d(Tensor x, {_TAIL}, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, str activation)"
    " -> Tensor"
)


def packed_linear(
    x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    pattern: list[int], rows: int, activation: str,
) -> Tensor:  # fmt: skip
    """``activation(x W^T + bias + residual)``.

    x: ``[..., in]``; values, codes, scales: of `nm_compiler.runtime.native.packing.pack`; bias: ``[rows]``, float32;
    residual: of the result's shape; pattern: ``[n, m]``; activation: one of `ACTIVATIONS`.
    Returns ``[..., rows]``, contiguous, of x's dtype. Raises NMError for operands that do not fit, before any is read.
    """
    width = x.shape[-1] if x.ndim else 0
    _check("packed_linear", x, values, codes, scales, bias, residual, pattern, rows, (rows, width), 1, activation)
    sizes_ = (*x.shape[:-1], rows)
    _check_residual("packed_linear", residual, sizes_)
    data = _float(x).contiguous()
    y = data.new_empty(sizes_)
    if y.numel() == 0:
        return y.to(x.dtype)
    tokens = data.numel() // width
    added = None if residual is None else _float(residual).contiguous()
    _library().run(Job(
        address(data), address(y), address(added), address(bias), address(values), address(codes), address(scales),
        DTYPES[values.dtype], pattern[0], pattern[1], 1, rows, width, 1, 1, tokens, 1, tokens, 1, 1, 1, 1, 0, 0, 1, 1,
        width, rows, 1, ACTIVATIONS[activation], int(tokens <= FEW),
    ))  # fmt: skip
    return y if y.dtype == x.dtype else y.to(x.dtype)


def packed_conv2d(
    x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    pattern: list[int], rows: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, activation: str,
) -> Tensor:  # fmt: skip
    """``activation(conv2d(x, W, bias, stride, padding, dilation, groups) + residual)``.

    x: ``[batch, in, height, width]``; rows: output channels; kernel, stride, padding, dilation: two numbers each, padding with
    zeros; the rest as for `packed_linear`. Returns ``[batch, rows, ...]`` in the memory format of x, of x's dtype.
    Raises NMError for operands that do not fit, before any is read.
    """
    form = _format(x)
    how = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    sizes_, numbers = _plan(x.shape, form == torch.channels_last, rows, *how, groups)
    shape = (rows, x.shape[1] // groups, *how[0])
    _check("packed_conv2d", x, values, codes, scales, bias, residual, pattern, rows, shape, groups, activation)
    _check_residual("packed_conv2d", residual, sizes_)
    data = _float(x).contiguous(memory_format=form)
    y = torch.empty(sizes_, dtype=torch.float32, memory_format=form)
    if y.numel() == 0:
        return y.to(x.dtype)
    added = None if residual is None else _float(residual).contiguous(memory_format=form)
    _library().run(Job(
        address(data), address(y), address(added), address(bias), address(values), address(codes), address(scales),
        DTYPES[values.dtype], pattern[0], pattern[1], *numbers, ACTIVATIONS[activation], 0,
    ))  # type: ignore[call-arg]  # fmt: skip
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _library() -> Library:
    found = load()
    if isinstance(found, str):
        raise NMError(f"nm::packed ops cannot run here: {found}")
    return found


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if lies_in_channels_last(x) else torch.contiguous_format


def _out_sizes(shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, Any]:
    found = [(shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return found[0], found[1]


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...], last: bool, rows: int, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...], groups: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """The result's shape, and a job's fields from groups to channels_last. last: channels are innermost."""
    if len(shape) != 4 or groups < 1 or shape[1] % groups or rows % groups:
        raise NMError(
            f"nm::packed_conv2d takes x [batch, in, height, width], its channels and {rows} rows in {groups} groups; "
            f"not {list(shape)}"
        )
    out_h, out_w = _checked_sizes(shape, kernel, stride, padding, dilation)
    batch, channels, height, width = shape
    images = (batch, height, width, out_h, out_w)
    if max(*kernel, *stride) == 1 and not any(padding):  # a linear: pixels are tokens
        pixels = height * width * (batch if last else 1)
        images = (1 if last else batch, 1, pixels, 1, pixels)
    fields = (
        groups,
        rows // groups,
        channels // groups,
        *images,
        *kernel,
        *stride,
        *padding,
        *dilation,
        channels,
        rows,
        int(last),
    )
    return (batch, rows, out_h, out_w), fields


def _checked_sizes(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, int]:
    """Height and width of the result."""
    given = f"nm::packed_conv2d: kernel {[*kernel]}, stride {[*stride]}, padding {[*padding]}, dilation {[*dilation]}"
    for numbers, least in ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1)):
        if len(numbers) != 2 or min(numbers) < least:
            raise NMError(f"{given}: two numbers each, padding from 0 on, the others from 1 on")
    found = _out_sizes(shape, kernel, stride, padding, dilation)
    if min(found) < 1:
        raise NMError(f"{given}: the images of x {list(shape)} are too small")
    return found


def _check_residual(name: str, residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if residual is not None and not (residual.shape == shape and residual.dtype in FLOATS and residual.is_cpu):
        raise NMError(f"nm::{name} adds a residual of the result's shape {list(shape)}, on the CPU, not {shown(residual)}")


def _check(
    name: str, x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    pattern: list[int], rows: int, shape: tuple[int, ...], groups: int, activation: str,
) -> None:  # fmt: skip
    """Everything that C takes on trust."""
    wanted = _wanted(shape, tuple(pattern), groups)
    fits = (
        math.prod(shape[1:]) > 0
        and values.shape == wanted[0]
        and codes.shape == wanted[1]
        and values.dtype in DTYPES
        and codes.dtype == torch.int32
        and values.is_contiguous()
        and codes.is_contiguous()
        and (scales is not None) == (values.dtype == torch.int8)
        and (scales is None or (scales.shape == wanted[2] and scales.dtype == torch.float32 and scales.is_contiguous()))
        and (bias is None or (bias.shape == (rows,) and bias.dtype == torch.float32 and bias.is_contiguous()))
    )
    if not fits:
        raise NMError(
            f"nm::{name}: x of {shown(x)} and a weight {list(shape)} of {Pattern(*pattern)} do not fit packed values "
            f"of {shown(values)}, codes of {shown(codes)} or the bias: pack again, or feed {shape[1] * groups} channels"
        )
    others = (bias is None or bias.is_cpu) and (scales is None or scales.is_cpu)
    if not (x.is_cpu and values.is_cpu and codes.is_cpu and others):
        raise NMError(f"nm::{name} runs on the CPU: x of {shown(x)}, packed values of {shown(values)}. Move all there")
    if x.dtype not in FLOATS:
        raise NMError(f"nm::{name} takes float32, bfloat16 or float16: x of {shown(x)}")
    if activation not in ACTIVATIONS:
        raise NMError(f"nm::{name}: activation={activation!r}; choose one of {', '.join(map(repr, ACTIVATIONS))}")


@cache
def _wanted(shape: tuple[int, ...], pattern: tuple[int, ...], groups: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of values, codes and scales. Raises NMError for a pattern that is none."""
    if len(pattern) != 2:
        raise NMError(f"a packed weight has a pattern [n, m], not {list(pattern)}")
    tiles, steps, words = sizes(shape, Pattern(*pattern), groups)
    return (groups, tiles, steps, LANES), (groups, tiles, words, LANES), (groups, tiles, LANES)


def _linear_fake(
    x: Tensor, values: Tensor, codes: Tensor, scales: Any, bias: Any, residual: Any, pattern: Any, rows: int, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _conv2d_fake(
    x: Tensor, values: Tensor, codes: Tensor, scales: Any, bias: Any, residual: Any, pattern: Any, rows: int,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, activation: str,
) -> Tensor:  # fmt: skip
    shape = (x.shape[0], rows, *_out_sizes(x.shape, kernel, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


_ops.impl("packed_linear", packed_linear, "CPU")
_ops.impl("packed_conv2d", packed_conv2d, "CPU")
torch.library.register_fake("nm::packed_linear", _linear_fake, lib=_ops)
torch.library.register_fake("nm::packed_conv2d", _conv2d_fake, lib=_ops)
LINEAR, CONV2D = torch.ops.nm.packed_linear.default, torch.ops.nm.packed_conv2d.default
