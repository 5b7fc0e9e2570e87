"""Pack a 16-bit weight as cuSPARSELt does on Hopper, in one pass over memory, of a masked weight or straight of a dense one.

    packed(W)                      W is 2:4 already
    packed_forward(W)              W * F, N of every M along `in`
    packed_backward(W, order)      ((W * B)[order])^T, of what F left N of every M along `out`

The layout is that of `layout`. Along rows a thread packs eight columns of two rows, whose places share a byte; for the turned
operand, eight columns of four or eight rows in the order. Places of threads beside each other are added up to whole words.
Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nm_compiler.runtime.cusparselt.layout import packed_shape
from nm_compiler.solvers.blocks_triton import column_of, load_rows, row_of
from nm_compiler.solvers.floats_triton import rounded
from nm_compiler.solvers.groups_triton import WORDS, joined, kept_of, load_words, masked_words, values_of, wide

ROWS = 16, 8
"""Pairs of rows and units of eight columns that one program packs."""
COLUMNS = 32, 4
"""Groups of rows and units of eight columns that one program packs: eight groups of one unit share whole words."""
_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _compressed(low, high):  # type: ignore[no-untyped-def]
    """Four entries of 2 bytes, at most two non-zero. Returns the two values that are kept, as one word, and four bits."""
    a, b, c = (low & 0x7FFF) != 0, (low & 0x7FFF0000) != 0, (high & 0x7FFF) != 0
    upper_b, upper_d = (low >> 16) & 0xFFFF, (high >> 16) & 0xFFFF
    lower_c = high & 0xFFFF
    first = tl.where(a, low & 0xFFFF, tl.where(b, upper_b, lower_c))
    second = tl.where(a & b, upper_b, tl.where((a | b) & c, lower_c, upper_d))
    code = tl.where(a, 0, tl.where(b, 1, 2)) | tl.where(a & b, 4, tl.where((a | b) & c, 8, 12))
    return first | (second << 16), code


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _of_eight(words, n: tl.constexpr, m: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of eight entries with zeros where they are not among the ``n`` largest of ``m``; m: 2, 4 or 8."""
    v = values_of(words, 8, size)
    kept = ()
    if m == 8:  # noqa: SIM108 - a line too long
        kept = kept_of(v, n, m)
    else:
        kept = kept_of((v[0], v[1], v[2], v[3]), n, m) + kept_of((v[4], v[5], v[6], v[7]), n, m)
    return masked_words(words, kept, 2 * size, size)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _narrow(words, entries: tl.constexpr, size: tl.constexpr, brain: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of two entries of 2 bytes: as they are, or rounded from float32 to bfloat16 (brain) or float16."""
    narrow = words
    if size == 4:
        narrow = ()
        for pair in tl.static_range(entries // 2):
            even = _rounded(words[2 * pair], brain).to(tl.int32)
            odd = _rounded(words[2 * pair + 1], brain).to(tl.int32)
            narrow += ((even & 0xFFFF) | (odd << 16),)
    return narrow


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded(word, brain: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of a float32 as those of a number of 2 bytes."""
    value = rounded(word.to(tl.float32, bitcast=True), tl.float16, brain)
    if not brain:
        value = value.to(tl.int16, bitcast=True)
    return value


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack_rows(source, values, places, out, inputs, n: tl.constexpr, m: tl.constexpr, size: tl.constexpr, brain: tl.constexpr, down: tl.constexpr, across: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """source: int64 ``[out, inputs * size / 8]``; values: int64 ``[out, inputs / 8]``; places: int32; m: 0 if masked."""
    at = tl.arange(0, down * across)
    unit = tl.program_id(1) * across + (at & (across - 1))
    pair = tl.program_id(0).to(tl.int64) * down + at // across
    units = inputs // 8
    there = (unit < units) & (pair < out // 2)
    row = (pair >> 3) * 16 + (pair & 7)
    upper = load_words(source, row * units + unit, there, size)
    lower = load_words(source, (row + 8) * units + unit, there, size)
    if m > 0:
        upper = _of_eight(upper, n, m, size)
        lower = _of_eight(lower, n, m, size)
    upper = _narrow(upper, 8, size, brain)
    lower = _narrow(lower, 8, size, brain)
    even, code = _compressed(upper[0], upper[1])
    odd, beside = _compressed(upper[2], upper[3])
    tl.store(values + row * units + unit, joined(even, odd), mask=there)
    code |= beside << 16
    even, below = _compressed(lower[0], lower[1])
    odd, beside = _compressed(lower[2], lower[3])
    tl.store(values + (row + 8) * units + unit, joined(even, odd), mask=there)
    code |= (below << 4) | (beside << 20)
    code = tl.reshape(code << (8 * ((unit >> 1) & 1)), (down, across // 4, 2, 2))
    code = tl.reshape(tl.sum(code, axis=2), (down * across // 2,))
    at = tl.arange(0, down * across // 2)
    unit = tl.program_id(1) * across + ((at & (across // 2 - 1)) >> 1) * 4 + (at & 1)
    pair = tl.program_id(0).to(tl.int64) * down + at // (across // 2)
    place = ((pair >> 5) * (units // 4) + (unit >> 2)) * 64 + (pair & 31) * 2 + (unit & 1)
    tl.store(places + place, code, mask=(unit < units) & (pair < out // 2))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack_columns(source, order, values, places, out, inputs, n: tl.constexpr, m: tl.constexpr, lines: tl.constexpr, size: tl.constexpr, brain: tl.constexpr, down: tl.constexpr, across: tl.constexpr, ordered: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """source: int64 ``[out, inputs * size / 8]``; values: int32 or, for eight lines, int64 ``[inputs, out / lines]``."""
    at = tl.arange(0, down * across)
    unit = tl.program_id(1) * across + (at & (across - 1))
    block = tl.program_id(0).to(tl.int64) * down + at // across
    units, blocks = inputs // 8, out // lines
    there = (unit < units) & (block < blocks)
    _rows, words = load_rows(source, order, block * lines, unit, units, there, lines, size, ordered)
    left = ()
    for line in tl.static_range(lines):
        left += _of_eight(row_of(words, line, 2 * size), n, m, size)
    single: tl.constexpr = 2 if lines == 4 else 1  # blocks that share 16 bits
    shift = (4 * (unit & 1) + 8 * ((block // (2 * single)) & 1) + 16 * (block & (single - 1))).to(tl.int32)
    tile = tl.program_id(0).to(tl.int64) * (down // (4 * single)) + tl.arange(0, down // (4 * single))[:, None, None]
    half = tl.arange(0, 2)[None, :, None]
    both = (tl.program_id(1) * (across // 2) + tl.arange(0, across // 2))[None, None, :]
    place = ((both >> 2) * (out // 32) + tile) * 64 + (both & 3) * 16 + half
    inside = (tile < out // 32) & (both < inputs // 16) & (half < 2)
    for column in tl.static_range(8):
        own = column_of(left, column, lines, 2 * size, size)
        own = masked_words(own, kept_of(values_of(own, lines, size), n, m), lines * size // 4, size)
        own = _narrow(own, lines, size, brain)
        kept, code = _compressed(own[0], own[1])
        if lines == 8:
            beside, further = _compressed(own[2], own[3])
            kept = joined(kept, beside)
            code |= further << 16
        tl.store(values + (unit.to(tl.int64) * 8 + column) * blocks + block, kept, mask=there)
        code = tl.reshape(code << shift, (down // (4 * single), 2, 2, single, across // 2, 2))
        code = tl.sum(tl.sum(tl.sum(code, axis=5), axis=3), axis=1)
        tl.store(places + place + 2 * column, code, mask=inside)


def packed(weight: Tensor) -> Tensor:
    """weight: ``[out, in]``, float16 or bfloat16, both multiples of `layout.STEP`, at most 2 of 4 along `in` non-zero.

    Returns what `layout.pack_plainly` does, to the bit.
    """
    return _rows(weight, 0, 0, weight.dtype)


def packed_forward(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """``W * F`` packed as numbers of ``dtype``. weight: float32 or ``dtype``, sizes as in `packed`; m: 2, 4 or 8."""
    return _rows(weight, n, m, dtype)


def _rows(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    given, result = _given(weight), weight.new_empty(packed_shape(*weight.shape), dtype=dtype)
    (out, inputs), (down, across) = weight.shape, ROWS
    kept = result.view(-1)[: out * inputs // 2]
    _pack_rows[(triton.cdiv(out, 2 * down), triton.cdiv(inputs, 8 * across))](
        given.view(WORDS), kept.view(WORDS), result.view(-1)[out * inputs // 2 :].view(torch.int32), out, inputs, n, m,
        size=weight.element_size(), brain=dtype == torch.bfloat16, down=down, across=across, num_warps=_WARPS,
    )  # fmt: skip
    return result


def packed_backward(weight: Tensor, order: Tensor | None, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """``((W * B)[order])^T`` packed as numbers of ``dtype``, see `packed_forward`; order: int64 ``[out]`` or None."""
    out, inputs = weight.shape
    given, result = _given(weight), weight.new_empty(packed_shape(inputs, out), dtype=dtype)
    (down, across), lines = COLUMNS, wide(m)
    kept = result.view(-1)[: out * inputs // 2].view(torch.int32 if lines == 4 else WORDS)
    _pack_columns[(triton.cdiv(out, lines * down), triton.cdiv(inputs, 8 * across))](
        given.view(WORDS), given if order is None else order.contiguous(), kept,
        result.view(-1)[out * inputs // 2 :].view(torch.int32), out, inputs, n, m, lines=lines, size=weight.element_size(),
        brain=dtype == torch.bfloat16, down=down, across=across, ordered=order is not None, num_warps=_WARPS,
    )  # fmt: skip
    return result


def _given(weight: Tensor) -> Tensor:
    given = weight.detach().contiguous()
    return given.clone() if given.data_ptr() % 16 else given
