"""Bi-Mask's backward weight on a GPU in one pass over memory: groups of M rows as they follow in an order, for `gpu`.

A program ranks the M numbers of a group in many columns at once, as `nm_compiler.solvers.masks_triton` ranks groups, and
writes what stays to where it came from: rows are neither gathered nor put back. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPARED = 8192  # pairs of entries that one program compares at once


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rank_rows(source, order, target, rows, outer, inner, parts, largest, n, m: tl.constexpr, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """source, target: ``[experts, outer, rows, inner]``, bits as whole numbers; order: ``[experts, rows]``.

    A row that is not there is left out. width: m, up to a power of two; parts: programs that share a group's columns.
    """
    program = tl.program_id(0).to(tl.int64)
    first_row = (program // parts) * m
    column = (program % parts) * block + tl.arange(0, block)
    entry = tl.arange(0, width)
    row = tl.load(order + first_row + entry, mask=entry < m, other=-1)
    outside = (first_row // rows) * outer + column // inner
    place = (outside * rows * inner + column % inner)[None, :] + (row * inner)[:, None]
    there = ((row >= 0) & (row < rows))[:, None] & (column < outer * inner)[None, :]
    bits = tl.load(source + place, mask=there, other=0)
    value = tl.where(there, bits & largest, -1)
    mine, other = value[:, None, :], value[None, :, :]
    first = (entry[None, :] < entry[:, None])[:, :, None]
    rank = tl.sum(((other > mine) | ((other == mine) & first)).to(tl.int32), axis=1)
    tl.store(target + place, tl.where(rank < n, bits, 0), mask=there)


def largest_rows(weight: Tensor, order: Tensor, n: int, m: int, inner: int, out: Tensor) -> None:
    """Write the ``n`` largest magnitudes of every ``m`` rows in the order, and zeros; to the bit as `magnitude_mask` has them.

    weight, out: of 2, 4 or 8 bytes a number, lying alike as ``[experts, outer, rows, inner]`` without gaps; order: int64
    ``[.., rows]``, contiguous, with ``new[i] = old[order[i]]`` for every expert; ``m`` divides the rows.
    """
    whole, width = _WHOLE[weight.element_size()], 1 << (m - 1).bit_length()
    columns = weight.numel() // order.numel()
    block = min(1 << (columns - 1).bit_length(), max(1, _COMPARED // width**2))
    parts = -(-columns // block)
    _rank_rows[(order.numel() // m * parts,)](
        weight.view(whole), order, out.view(whole), order.shape[-1], columns // inner, inner, parts, torch.iinfo(whole).max, n,
        m=m, width=width, block=block,
    )  # fmt: skip
