"""Time a product sparse against the best dense way: eager, turned, in both layouts, and if asked for as inductor has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.runtime.choose import Timing, side_by_side
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.native.eligible import Conv
from nm_compiler.runtime.native.ops import CONV2D, LINEAR
from nm_compiler.runtime.native.packing import Packed
from nm_compiler.runtime.native.volumes import Images, Volume, through_images

Way = Callable[[], Any]


def timed(
    weight: Tensor, packed: list[Packed], x: Tensor, bias: Tensor | None, conv: Conv | Volume | None, *, inductor: bool = False
) -> Timing:
    """The product of ``x`` with ``weight`` both ways, each the fastest of its ways: images are tried in both layouts.

    packed: one weight, or those of a volume's products; inductor: dense may also be prepacked, which eager torch does not do.
    """
    with torch.no_grad():
        sparse, *others = [_sparse(packed, form, bias, conv) for form in _forms(x, conv)]
        ways = list(_linear_ways(weight, x, bias) if conv is None else _conv_ways(weight, x, bias, conv))
        if inductor:
            ways += _linear_prepacked(weight, x, bias) if conv is None else _conv_prepacked(weight, x, bias, conv)
        quick = [side_by_side(way, sparse, x.device, rounds=3) for way in ways]
        best = ways[min(range(len(ways)), key=lambda index: quick[index].dense_s)]
        for other in others:
            sparse = other if side_by_side(sparse, other, x.device, rounds=3).speedup > 1 else sparse
        return side_by_side(best, sparse, x.device)


def _forms(x: Tensor, conv: Conv | Volume | None) -> list[Tensor]:
    """As it lies, and images in the other layout: `nm_compiler.passes.channels_last` can give them that."""
    if conv is None or x.ndim != 4:
        return [x]
    form = torch.contiguous_format if lies_in_channels_last(x) else torch.channels_last
    return [x, x.contiguous(memory_format=form)]


def _sparse(products: list[Packed], x: Tensor, bias: Tensor | None, conv: Conv | Volume | None) -> Way:
    added = None if bias is None else bias.float()
    if isinstance(conv, Volume):
        return partial(_volume, products, x, added, conv)
    (packed,) = products
    n, m, rows = packed.pattern.n, packed.pattern.m, packed.shape[0]
    operands = (packed.values, packed.codes, packed.scales, added, None, [n, m], rows)
    if conv is None:
        return lambda: LINEAR(x, *operands, "")
    kernel = [1, *packed.shape[2:]][-2:]
    data = x.unsqueeze(2) if conv.one_axis else x
    how = (kernel, list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups, "")
    return lambda: CONV2D(data, *operands, *how)


def _volume(packed: list[Packed], x: Tensor, bias: Tensor | None, volume: Volume) -> Tensor:
    def called(op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    def product(part: int, images: Tensor, how: Images, residual: Tensor | None) -> Tensor:
        each, first = packed[part], bias if part == 0 else None
        operands = (each.values, each.codes, each.scales, first, residual, [each.pattern.n, each.pattern.m], each.shape[0])
        return CONV2D(images, *operands, how.kernel, how.stride, how.padding, how.dilation, volume.groups, "")  # type: ignore[no-any-return]

    wide = x.float() if len(packed) > 1 else x
    made: Tensor = through_images(volume, wide, x.shape, called, product)
    return made.to(x.dtype)


def _linear_ways(weight: Tensor, x: Tensor, bias: Tensor | None) -> Iterator[Way]:
    flat, turned = x.reshape(-1, x.shape[-1]), weight.t().contiguous()
    yield lambda: functional.linear(x, weight, bias)
    yield (lambda: torch.mm(flat, turned)) if bias is None else (lambda: torch.addmm(bias, flat, turned))


def _linear_prepacked(weight: Tensor, x: Tensor, bias: Tensor | None) -> Iterator[Way]:
    flat = x.reshape(-1, x.shape[-1])
    with contextlib.suppress(Exception):  # torch's own packed form; not every build and dtype has it
        mkldnn: Any = torch.ops.mkldnn
        packed = mkldnn._reorder_linear_weight(weight, flat.shape[0])
        mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
        yield lambda: mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")


def _conv_ways(weight: Tensor, x: Tensor, bias: Tensor | None, conv: Conv | Volume) -> Iterator[Way]:
    data, kernel = _with_height(weight, x, conv)
    how, compute = (conv.stride, conv.padding, conv.dilation, conv.groups), functional.conv2d
    last = torch.channels_last
    if isinstance(conv, Volume):
        compute, last = functional.conv3d, torch.channels_last_3d
    for form in (torch.contiguous_format, last):
        there, turned = data.contiguous(memory_format=form), kernel.contiguous(memory_format=form)
        yield partial(compute, there, turned, bias, *how)


def _conv_prepacked(weight: Tensor, x: Tensor, bias: Tensor | None, conv: Conv | Volume) -> Iterator[Way]:
    data, kernel = _with_height(weight, x, conv)
    last = torch.channels_last_3d if isinstance(conv, Volume) else torch.channels_last
    with contextlib.suppress(Exception):
        mkldnn: Any = torch.ops.mkldnn
        sizes: Any = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        packed = mkldnn._reorder_convolution_weight(kernel, *sizes, list(data.shape))
        there = data.contiguous(memory_format=last)
        mkldnn._convolution_pointwise(there, packed, bias, *sizes, "none", [], "")
        yield lambda: mkldnn._convolution_pointwise(there, packed, bias, *sizes, "none", [], "")


def _with_height(weight: Tensor, x: Tensor, conv: Conv | Volume) -> tuple[Tensor, Tensor]:
    """Data and weight, with a second axis of space if they have one."""
    one = isinstance(conv, Conv) and conv.one_axis
    return (x.unsqueeze(2), weight.unsqueeze(2)) if one else (x, weight)
