"""How a weight is cut into groups: rows of output channels, groups of M input channels inside one tap.

Groups of a row are numbered row-major over the weight permuted to (out, *taps, in), so a group never straddles
a row, a tap or a conv group: the only cut that TensorRT, cuSPARSELt and an NHWC implicit GEMM can use.
All functions return views; nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def out_axis_of(in_axis: int) -> int:
    """The output-channel axis that belongs to a reduction axis: ``[out, in, *taps]`` or, transposed, ``[in, out]``."""
    return 1 if in_axis == 0 else 0


def as_rows(weight: Tensor, in_axis: int) -> Tensor:
    """View a weight as ``[out, *taps, in]``.

    weight: ``[out, in, *taps]`` with in_axis 1, or ``[in, out]`` with in_axis 0.
    """
    out_axis = out_axis_of(in_axis)
    taps = [axis for axis in range(weight.ndim) if axis not in (in_axis, out_axis)]
    rows: Tensor = torch.permute(weight, (out_axis, *taps, in_axis))
    return rows


def as_groups(weight: Tensor, in_axis: int, m: int) -> Tensor:
    """View a weight as ``[out, *taps, in / m, m]``: one forward group in each row of the last axis."""
    groups: Tensor = as_rows(weight, in_axis).unflatten(-1, (-1, m))
    return groups


def groups_per_row(shape: tuple[int, ...], in_axis: int, m: int) -> int:
    """Number of groups in one output row, taps included."""
    count = 1
    for size in shape:
        count *= size
    return count // shape[out_axis_of(in_axis)] // m
