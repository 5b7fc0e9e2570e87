"""How a weight is cut into groups: rows of output channels, groups of M weights along the reduction axis.

Every axis of a weight plays one part:

    in      the reduction axis: forward groups are M consecutive weights along it
    out     the output axis: Bi-Mask's backward groups are M rows along it
    batch   what has rows of its own: experts, or outer output axes such as heads
    taps    other axes that are summed over: the taps of a convolution

Groups of a row are numbered row-major over the weight permuted to (*batch, out, *taps, in), so a group never straddles
a row, a tap or a conv group: the only cut that TensorRT, cuSPARSELt and an NHWC implicit GEMM can use.
`as_rows` and `as_groups` return views; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts that the axes of a weight play; an axis that is not named is a tap.

    >>> Layout(in_axis=1, out_axis=0).rows(4)  # a convolution [out, in, *taps]
    (0, 2, 3, 1)
    >>> Layout(in_axis=1, out_axis=2, batch=(0,)).rows(3)  # experts [expert, in, out]
    (0, 2, 1)
    """

    in_axis: int
    out_axis: int
    batch: tuple[int, ...] = ()

    def rows(self, ndim: int) -> tuple[int, ...]:
        """The axes as (*batch, out, *taps, in): a permutation for `as_rows`."""
        named = (*self.batch, self.out_axis, self.in_axis)
        taps = (axis for axis in range(ndim) if axis not in named)
        return (*self.batch, self.out_axis, *taps, self.in_axis)


def as_rows(weight: Tensor, rows: Sequence[int]) -> Tensor:
    """View a weight as ``[*batch, out, *taps, in]``; rows: from `Layout.rows`."""
    viewed: Tensor = torch.permute(weight, tuple(rows))
    return viewed


def as_groups(weight: Tensor, rows: Sequence[int], m: int) -> Tensor:
    """View a weight as ``[*batch, out, *taps, in / m, m]``: one forward group in each row of the last axis."""
    groups: Tensor = as_rows(weight, rows).unflatten(-1, (-1, m))
    return groups
