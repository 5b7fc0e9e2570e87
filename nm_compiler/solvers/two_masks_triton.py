"""Both masks of Bi-Mask and the transpose between them on a GPU, in one pass over the weight, for `two_masks`.

Up to M = 8 and 4 bytes a thread does this for a block of M x M in registers: it reads rows taken in the order, ranks each,
writes what is left back to where it came from, and ranks and writes the columns of what is left. Else a program does it for a
tile together. Ranks as in `nm_compiler.solvers.masks_triton`: of larger entries, and of equal ones before. Importing this
module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nm_compiler.solvers.blocks_triton import column_of, load_rows, row_of
from nm_compiler.solvers.groups_triton import SIZES, WORDS, kept_of, masked_words, store_words, values_of, wide

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPARED = 16384  # pairs of entries that one program compares at once
_IN_REGISTERS = (2, 4, 8)
_TILE = 16, 8  # blocks down and across that one program has: a quarter of it, one warp, reads and writes whole sectors
_WARPS = 4


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


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mask_and_turn_blocks(source, order, masked, turned, out, inputs, n: tl.constexpr, m: tl.constexpr, width: tl.constexpr, size: tl.constexpr, down: tl.constexpr, across: tl.constexpr, ordered: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """As `_mask_and_turn`, all as int64; a thread has a block ``[width, width]``, a program ``[down, across]`` of them."""
    count: tl.constexpr = width * size // 8
    at = tl.arange(0, down * across)
    column = tl.program_id(1) * across + (at & (across - 1))
    block = tl.program_id(0).to(tl.int64) * down + at // across
    units, blocks = inputs // width, out // width
    there = (column < units) & (block < blocks)
    rows, words = load_rows(source, order, block * width, column, units, there, width, count, ordered)
    left = ()
    for line in tl.static_range(width):
        own = row_of(words, line, 2 * count)
        left += masked_words(own, kept_of(values_of(own, width, size), n, m), 2 * count, size)
    for line in tl.static_range(width):
        store_words(masked, rows[line] * units + column, there, row_of(left, line, 2 * count), count)
    for entry in tl.static_range(width):
        own = column_of(left, entry, width, 2 * count, size)
        own = masked_words(own, kept_of(values_of(own, width, size), n, m), 2 * count, size)
        store_words(turned, (column.to(tl.int64) * width + entry) * blocks + block, there, own, count)


def two_masks(weight: Tensor, order: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As `nm_compiler.solvers.two_masks.two_masks`, to the bit. m: a power of two up to 16."""
    out, inputs = weight.shape
    given = weight.detach().contiguous()
    masked, turned = torch.empty_like(given), given.new_empty(inputs, out)
    if weight.numel():
        launch = _launch_blocks if _fits(weight, m) else _launch_tiles
        launch(given, order, masked, turned, n, m)
    return masked, turned


def _fits(weight: Tensor, m: int) -> bool:
    return m in _IN_REGISTERS and weight.element_size() in SIZES and all(size % wide(m) == 0 for size in weight.shape)


def _launch_blocks(given: Tensor, order: Tensor | None, masked: Tensor, turned: Tensor, n: int, m: int) -> None:
    """Threads load and store up to 16 bytes at once, where the weight begins at a multiple of that."""
    if given.data_ptr() % 16:
        given = given.clone()
    width, (down, across), (out, inputs) = wide(m), _TILE, given.shape
    _mask_and_turn_blocks[(-(-out // (width * down)), -(-inputs // (width * across)))](
        given.view(WORDS), given if order is None else order.contiguous(), masked.view(WORDS), turned.view(WORDS), out, inputs,
        n, m, width=width, size=given.element_size(), down=down, across=across, ordered=order is not None, num_warps=_WARPS,
    )  # fmt: skip


def _launch_tiles(given: Tensor, order: Tensor | None, masked: Tensor, turned: Tensor, n: int, m: int) -> None:
    whole, (out, inputs) = _WHOLE[given.element_size()], given.shape
    width = 64 if m <= 8 else 32
    height = min(64, _COMPARED // (m * width))
    _mask_and_turn[(-(-out // height), -(-inputs // width))](
        given.view(whole), given if order is None else order.contiguous(), masked.view(whole), turned.view(whole), out, inputs,
        torch.iinfo(whole).max, n, m=m, height=height, width=width, ordered=order is not None,
    )  # fmt: skip
