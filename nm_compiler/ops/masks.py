"""Masks derived from the state beside a weight: nothing here has a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nm_compiler.layout import as_rows
from nm_compiler.ops.lean import custom_op
from nm_compiler.solvers.combinations import union, unpack
from nm_compiler.solvers.live import cover


@custom_op("nm::live_mask", mutates_args=())
def live_mask(live: Tensor, table: Tensor, shape: list[int], rows: list[int]) -> Tensor:
    """1 where some live combination covers the position. LBC, section 3.2.

    live, table: see `nm_compiler.solvers.combinations`; shape: of the weight; rows: its axes as
    (*batch, out, *taps, in), see `nm_compiler.layout`. Returns bool of that shape.
    """
    mask = torch.empty(shape, dtype=torch.bool, device=live.device)
    by_row = as_rows(mask, rows)
    if not cover(live, table, by_row):
        by_row.copy_(union(live, table).view(by_row.shape))
    return mask


@live_mask.register_fake
def _(live: Tensor, table: Tensor, shape: list[int], rows: list[int]) -> Tensor:
    return live.new_empty(shape, dtype=torch.bool)


@custom_op("nm::unpack_mask", mutates_args=())
def unpack_mask(bits: Tensor, shape: list[int]) -> Tensor:
    """A fixed mask from its packed form: uint8 ``[shape[0], ceil(rest / 8)]`` to bool ``shape``."""
    length = 1
    for size in shape[1:]:
        length *= size
    return unpack(bits, length).reshape(shape)


@unpack_mask.register_fake
def _(bits: Tensor, shape: list[int]) -> Tensor:
    return bits.new_empty(shape, dtype=torch.bool)


def unpack_masks(calls: Sequence[Sequence[Any]]) -> list[Tensor]:
    """``[unpack_mask(bits, shape), ...]`` at once, where rows fill their bytes: views of one tensor. Bits on one device."""
    if any(math.prod(shape[1:]) % 8 for _, shape in calls):
        return [unpack_mask.kernel(*call) for call in calls]
    flat = torch.cat([bits.reshape(-1) for bits, _ in calls])
    parts = unpack(flat, 8 * len(flat)).split([math.prod(shape) for _, shape in calls])
    return [part.view(shape) for part, (_, shape) in zip(parts, calls, strict=True)]
