"""``nm::packed_linear`` and ``nm::packed_conv2d``: products with packed N:M weights on the CPU, epilogues included.

    y = activation(x W^T + bias + residual)        in one pass: bias when sums start, the rest when they are written

x is float32 (bfloat16 and float16 are converted there and back); sums are float32. Up to 24 tokens a linear reads every
weight once and leaves x where it is; beyond that x is packed into panels, stays as it is, or both (few.h; panel.h, lanes.h and
mixed.h). bfloat16 x with bfloat16 values stay what they are where the processor multiplies them, two pairs in one operation
(few_dots.h, dots.h); it takes denormal numbers for zeros then, as torch's own products do. Results of convolutions have the
memory format of x. A position that was pruned is not read: where a dense product makes 0 * inf = NaN of it, this one does not.
Inference only: there is no gradient.

They are defined without `torch.library.custom_op`, whose wrapper takes longer than a small product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.native.job import ACTIVATIONS, DTYPES, Job, address
from nm_compiler.runtime.native.library import Library, load
from nm_compiler.runtime.native.shapes import Shapes, of_conv2d, of_linear, out_sizes
from nm_compiler.wording import shown

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
    halves = _are_halves(x, values, residual)
    shapes = of_linear(x.shape, rows, tuple(pattern), values.dtype, activation, halves)
    _check("packed_linear", shapes, x, values, codes, scales, bias, residual, activation)
    return _run(shapes, torch.contiguous_format, x, values, codes, scales, bias, residual)


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
    shapes = of_conv2d(
        x.shape, form is torch.channels_last, rows, tuple(pattern), values.dtype, tuple(kernel), tuple(stride),
        tuple(padding), tuple(dilation), groups, activation, _are_halves(x, values, residual),
    )  # fmt: skip
    _check("packed_conv2d", shapes, x, values, codes, scales, bias, residual, activation)
    return _run(shapes, form, x, values, codes, scales, bias, residual)


def _run(
    shapes: Shapes, form: torch.memory_format, x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None,
    bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """Of operands that were checked."""
    dtype = torch.bfloat16 if shapes.halves else torch.float32
    y = torch.empty_strided(shapes.result, shapes.strides, dtype=dtype)
    if shapes.numel:
        data = _laid_out(x, dtype, form)
        added = None if residual is None else _laid_out(residual, dtype, form)
        _library().run(Job(
            data.data_ptr(), y.data_ptr(), address(added), address(bias), values.data_ptr(), codes.data_ptr(),
            address(scales), shapes.fields,
        ))  # fmt: skip
    return y if x.dtype == dtype else y.to(x.dtype)


def _library() -> Library:
    found = load()
    if isinstance(found, str):
        raise NMError(f"nm::packed ops cannot run here: {found}")
    return found


def _laid_out(tensor: Tensor, dtype: torch.dtype, form: torch.memory_format) -> Tensor:
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous(memory_format=form)


def _are_halves(x: Tensor, values: Tensor, residual: Tensor | None) -> bool:
    """Whether all is bfloat16 and the processor multiplies that. Nothing is rounded that was not."""
    return (
        x.dtype == torch.bfloat16
        and values.dtype == torch.bfloat16
        and (residual is None or residual.dtype == torch.bfloat16)
        and _library().halves
    )


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if lies_in_channels_last(x) else torch.contiguous_format


def _check(
    name: str, shapes: Shapes, x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> None:  # fmt: skip
    """Everything that C takes on trust."""
    rows = shapes.weight[0]
    fits = (
        math.prod(shapes.weight[1:]) > 0
        and values.shape == shapes.values
        and codes.shape == shapes.codes
        and values.dtype in DTYPES
        and codes.dtype == torch.int32
        and values.is_contiguous()
        and codes.is_contiguous()
        and (scales is not None) == (values.dtype == torch.int8)
        and (scales is None or (scales.shape == shapes.scales and scales.dtype == torch.float32 and scales.is_contiguous()))
        and (bias is None or (bias.shape == (rows,) and bias.dtype == torch.float32 and bias.is_contiguous()))
    )
    if not fits:
        raise NMError(
            f"nm::{name}: x of {shown(x)} and a weight {list(shapes.weight)} of {shapes.pattern} do not fit packed values "
            f"of {shown(values)}, codes of {shown(codes)} or the bias: pack again, or feed "
            f"{shapes.weight[1] * shapes.conv_groups} channels"
        )
    others = (bias is None or bias.is_cpu) and (scales is None or scales.is_cpu)
    if not (x.is_cpu and values.is_cpu and codes.is_cpu and others):
        raise NMError(f"nm::{name} runs on the CPU: x of {shown(x)}, packed values of {shown(values)}. Move all there")
    if x.dtype not in FLOATS:
        raise NMError(f"nm::{name} takes float32, bfloat16 or float16: x of {shown(x)}")
    if activation not in ACTIVATIONS:
        raise NMError(f"nm::{name}: activation={activation!r}; choose one of {', '.join(map(repr, ACTIVATIONS))}")
    if residual is not None and not (residual.shape == shapes.result and residual.dtype in FLOATS and residual.is_cpu):
        raise NMError(
            f"nm::{name} adds a residual of the result's shape {list(shapes.result)}, on the CPU, not {shown(residual)}"
        )


def _linear_fake(
    x: Tensor, values: Tensor, codes: Tensor, scales: Any, bias: Any, residual: Any, pattern: Any, rows: int, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _conv2d_fake(
    x: Tensor, values: Tensor, codes: Tensor, scales: Any, bias: Any, residual: Any, pattern: Any, rows: int,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, activation: str,
) -> Tensor:  # fmt: skip
    shape = (x.shape[0], rows, *out_sizes(x.shape, kernel, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


_ops.impl("packed_linear", packed_linear, "CPU")
_ops.impl("packed_conv2d", packed_conv2d, "CPU")
torch.library.register_fake("nm::packed_linear", _linear_fake, lib=_ops)
torch.library.register_fake("nm::packed_conv2d", _conv2d_fake, lib=_ops)
LINEAR, CONV2D = torch.ops.nm.packed_linear.default, torch.ops.nm.packed_conv2d.default
