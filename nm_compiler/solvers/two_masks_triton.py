"""Both masks of Bi-Mask and the transpose between them on a GPU, in one pass over the weight, for `two_masks`.

A program reads a tile of the weight, rows taken in the order, ranks its groups along the inputs, writes what is left back to
where it came from, turns the tile, and ranks what is left along the outputs. Groups lie whole inside a tile. Ranks as in
`nm_compiler.solvers.masks_triton`: of larger entries, and of equal ones before. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16
"""The largest M, a power of two, whose groups fit into a tile."""
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPARED = 16384  # pairs of entries that one program compares at once


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kept(values, largest, n, m: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """values: ``[rows, columns]``, bits as whole numbers. Whether each is among the ``n`` largest of its ``m`` in a row."""
    group = tl.reshape(values & largest, (rows * columns // m, m))
    entry = tl.arange(0, m)
    mine, other = group[:, :, None], group[:, None, :]
    first = (entry[None, :] < entry[:, None])[None, :, :]
    rank = tl.sum(((other > mine) | ((other == mine) & first)).to(tl.int32), axis=2)
    return tl.reshape(rank, (rows, columns)) < n


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mask_and_turn(source, order, masked, turned, out, inputs, largest, n, m: tl.constexpr, height: tl.constexpr, width: tl.constexpr, ordered: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """source, masked: ``[out, inputs]``; turned: ``[inputs, out]``, outputs in the order; all as whole numbers."""
    place = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    column = tl.program_id(1).to(tl.int64) * width + tl.arange(0, width)
    row = place
    if ordered:
        row = tl.load(order + place, mask=place < out, other=0)
    at = row[:, None] * inputs + column[None, :]
    there = (place < out)[:, None] & (column < inputs)[None, :]
    bits = tl.load(source + at, mask=there, other=0)
    forward = tl.where(_kept(bits, largest, n, m, height, width), bits, 0)
    tl.store(masked + at, forward, mask=there)
    across = tl.trans(forward)
    backward = tl.where(_kept(across, largest, n, m, width, height), across, 0)
    there = (column < inputs)[:, None] & (place < out)[None, :]
    tl.store(turned + column[:, None] * out + place[None, :], backward, mask=there)


def two_masks(weight: Tensor, order: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As `nm_compiler.solvers.two_masks.two_masks`, to the bit. m: a power of two up to `WIDEST`."""
    out, inputs = weight.shape
    given = weight.detach().contiguous()
    masked, turned = torch.empty_like(given), given.new_empty(inputs, out)
    if weight.numel():
        whole = _WHOLE[weight.element_size()]
        width = 64 if m <= 8 else 32
        height = min(64, _COMPARED // (m * width))
        _mask_and_turn[(triton.cdiv(out, height), triton.cdiv(inputs, width))](
            given.view(whole), given if order is None else order, masked.view(whole), turned.view(whole), out, inputs,
            torch.iinfo(whole).max, n, m=m, height=height, width=width, ordered=order is not None,
        )  # fmt: skip
    return masked, turned
