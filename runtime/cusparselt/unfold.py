"""A 2-D convolution as one matrix product: the inputs that each output pixel reads, side by side in a row (im2col).

    x [.., in, H, W]     --nm::unfold_taps-->    [.., H', W', taps * in]
    W [out, in, *taps]   --matrix_of-->          [out, taps * in]

Taps lie outside and channels inside, so groups of a weight, which run along its input channels, stay whole and consecutive.
A convolution of 3x3 taps copies nine times its input, which TensorRT's kernels for convolutions do not: this form only pays
where it is measured to. 1x1 taps of stride 1 without padding need no copy and do not come here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from nm_compiler.graph import arguments_of, per_axis

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a 2-D convolution of one group reads. sides: padding (left, right, top, bottom)."""

    taps: Pair = (1, 1)
    stride: Pair = (1, 1)
    sides: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    @property
    def plain(self) -> bool:
        """Whether every output pixel reads the input pixel at its own place, so that nothing has to be copied."""
        return self.taps == (1, 1) and self.stride == (1, 1) and not any(self.sides)


def geometry_of(node: Node, taps: Sequence[int]) -> Geometry:
    """The geometry of an `aten.conv2d`, by numbers or by ``padding="same"``."""
    given = arguments_of(node)
    steps, spread, padding = _pair(given["stride"]), _pair(given["dilation"]), given["padding"]
    if padding == "same":  # an odd total has its larger half at the end, as torch pads
        totals = [spread[axis] * (taps[axis] - 1) for axis in (1, 0)]
        left, top = (total // 2 for total in totals)
        sides = left, totals[0] - left, top, totals[1] - top
    else:
        top, left = (0, 0) if isinstance(padding, str) else _pair(padding)
        sides = left, left, top, top
    return Geometry((taps[0], taps[1]), steps, sides, spread)


def _pair(value: Any) -> Pair:
    down, across = per_axis(value, 2)
    return down, across


def matrix_of(weight: Tensor) -> Tensor:
    """``[out, taps * in]`` of ``[out, in]`` or ``[out, in, *taps]``, channels innermost, contiguous."""
    return weight.detach().movedim(1, -1).flatten(1).contiguous()


@torch.library.custom_op("nm::unfold_taps", mutates_args=())
def unfold_taps(x: Tensor, taps: list[int], stride: list[int], sides: list[int], dilation: list[int]) -> Tensor:
    """``[.., in, H, W]`` to ``[.., H', W', taps * in]``, contiguous; the arguments are those of `Geometry`. No gradient."""
    pixels = functional.pad(x.movedim(-3, -1), (0, 0, *sides))
    high, wide = _sizes(x, taps, stride, sides, dilation)
    rows = [slice(at, at + (high - 1) * stride[0] + 1, stride[0]) for at in range(0, taps[0] * dilation[0], dilation[0])]
    columns = [slice(at, at + (wide - 1) * stride[1] + 1, stride[1]) for at in range(0, taps[1] * dilation[1], dilation[1])]
    parts = [pixels[..., row, column, :] for row in rows for column in columns]
    return torch.cat(parts, -1, out=_empty(x, taps, high, wide))


@unfold_taps.register_fake
def _(x: Tensor, taps: list[int], stride: list[int], sides: list[int], dilation: list[int]) -> Tensor:
    return _empty(x, taps, *_sizes(x, taps, stride, sides, dilation))


def _sizes(x: Tensor, taps: list[int], stride: list[int], sides: list[int], dilation: list[int]) -> list[int]:
    padded = x.shape[-2] + sides[2] + sides[3], x.shape[-1] + sides[0] + sides[1]
    return [(padded[axis] - dilation[axis] * (taps[axis] - 1) - 1) // stride[axis] + 1 for axis in (0, 1)]


def _empty(x: Tensor, taps: list[int], high: int, wide: int) -> Tensor:
    return x.new_empty((*x.shape[:-3], high, wide, math.prod(taps) * x.shape[-3]))
