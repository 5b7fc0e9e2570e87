# mypy: disable-error-code="assignment"
"""Groups of a weight in registers, for Triton kernels: a thread loads whole groups as whole words and ranks them by itself.

A *unit* is one group, or two of M = 2: ``wide`` entries, ``wide * size`` bytes, a multiple of 8. Tensors are ``[block]``, one
unit a place; what a unit has several of comes as a tuple. Nothing is exchanged between threads, and nothing is a 3-D tensor.

    words     int32, the unit's bytes in their order, two entries of 2 bytes or one of 4 bytes each
    values    int32, one an entry: its magnitude as a whole number, which orders as magnitudes do, NaN above all
    kept      int32, one for every four entries: byte j is 1 if entry j is among the N largest of its M, else 0

Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

RANKED = (2, 4, 8, 16)
"""The M whose groups fit into registers."""
SIZES = (2, 4)
"""Bytes of the entries that fit."""
WORDS = torch.int64
"""What kernels load from and store to."""


def wide(m: int) -> int:
    """How many entries a unit has: whole groups, four at least."""
    return max(m, 4)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_words(source, unit, there, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """source: int64; ``count`` of them a unit, 1 or an even number. Returns ``2 * count`` words."""
    words = ()
    if count == 1:
        both = tl.load(source + unit, mask=there, other=0)
        words = (both.to(tl.int32), (both >> 32).to(tl.int32))
    else:
        pair = tl.arange(0, 2)[None, :]
        for part in tl.static_range(count // 2):
            place = (unit * count + 2 * part)[:, None] + pair
            first, second = tl.split(tl.load(source + place, mask=there[:, None], other=0))
            words += (first.to(tl.int32), (first >> 32).to(tl.int32))
            words += (second.to(tl.int32), (second >> 32).to(tl.int32))
    return words


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def joined(low, high):  # type: ignore[no-untyped-def]
    """Two words as one int64."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_words(target, unit, there, words, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """The opposite of `load_words`; target: int64."""
    if count == 1:
        tl.store(target + unit, joined(words[0], words[1]), mask=there)
    else:
        pair = tl.arange(0, 2)[None, :]
        for part in tl.static_range(count // 2):
            place = (unit * count + 2 * part)[:, None] + pair
            both = tl.join(joined(words[4 * part], words[4 * part + 1]), joined(words[4 * part + 2], words[4 * part + 3]))
            tl.store(target + place, both, mask=there[:, None])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def values_of(words, entries: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """The magnitudes of ``entries`` entries of ``size`` bytes; those of 2 bytes in the upper half."""
    values = ()
    for entry in tl.static_range(entries):
        if size == 4:
            values += (words[entry] & 0x7FFFFFFF,)
        elif entry % 2:
            values += (words[entry // 2] & 0x7FFF0000,)
        else:
            values += ((words[entry // 2] << 16) & 0x7FFF0000,)
    return values


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def kept_of(values, n: tl.constexpr, m: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the values, ``max(m, 4)`` of them, are among the ``n`` largest of ``m``; the earlier one wins among equals."""
    kept = ()
    if n == 1:
        kept = _first_largest(values, m)
    elif m == 16:
        kept = _ranked_sixteen(values, n)
    else:
        kept = _ranked_eight(values, n, m)
    return kept


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _first_largest(values, m: tl.constexpr):  # type: ignore[no-untyped-def]
    """`kept_of` for 1:M, by what is seen on the way."""
    kept = ()
    if m == 2:
        second = tl.where(values[1] > values[0], 1 << 8, 1)
        fourth = tl.where(values[3] > values[2], 1 << 24, 1 << 16)
        kept = (second | fourth,)
    else:
        best, shift = values[0], tl.zeros_like(values[0])
        for entry in tl.static_range(1, m):
            shift = tl.where(values[entry] > best, 8 * entry, shift)
            best = tl.maximum(best, values[entry])
        for word in tl.static_range(m // 4):
            inside = (shift >> 5) == word
            kept += (tl.where(inside, 1 << (shift & 31), 0),)
    return kept


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _ranked_eight(values, n: tl.constexpr, m: tl.constexpr):  # type: ignore[no-untyped-def]
    """`kept_of` for M up to 8: how many beat entry j adds up in four bits from ``8 (j % 4) + 4 (j // 4)`` on, at most 7."""
    ranks = tl.zeros_like(values[0])
    for late in tl.static_range(1, 4 if m == 2 else m):
        for early in tl.static_range(late):
            if early // m == late // m:
                here = 1 << (8 * (early % 4) + 4 * (early // 4))
                there = 1 << (8 * (late % 4) + 4 * (late // 4))
                ranks += tl.where(values[late] > values[early], here, there)
    beaten = ~(ranks + (8 - n) * 0x11111111)  # the highest of the four bits says that n or more beat it, turned round
    kept = ((beaten >> 3) & 0x01010101,)
    if m == 8:
        kept += ((beaten >> 7) & 0x01010101,)
    return kept


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _ranked_sixteen(values, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """`kept_of` for M = 16: as `_ranked_eight`, in two numbers, and ranks fill their four bits."""
    low, high = tl.zeros_like(values[0]), tl.zeros_like(values[0])
    for late in tl.static_range(1, 16):
        for early in tl.static_range(late):
            here = 1 << (8 * (early % 4) + 4 * (early // 4 % 2))
            there = 1 << (8 * (late % 4) + 4 * (late // 4 % 2))
            beats = values[late] > values[early]
            if late < 8:
                low += tl.where(beats, here, there)
            elif early >= 8:
                high += tl.where(beats, here, there)
            else:
                low += tl.where(beats, here, 0)
                high += tl.where(beats, 0, there)
    return (_below(low, n), _below(low >> 4, n), _below(high, n), _below(high >> 4, n))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _below(ranks, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the lower four bits of each byte are less than ``n``, 1 or 0 in it."""
    return (~((ranks & 0x0F0F0F0F) + (128 - n) * 0x01010101) >> 7) & 0x01010101


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def is_kept(kept, entry: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 or 0 for one entry."""
    return (kept[entry // 4] >> (8 * (entry % 4))) & 1


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def masked_words(words, kept, count: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """``count`` words with zeros where nothing is kept."""
    left = ()
    for at in tl.static_range(count):
        if size == 4:
            left += (words[at] & -is_kept(kept, at),)
        else:
            pair = kept[at // 2] >> (16 * (at % 2))
            left += (words[at] & ((pair & 1) * 0xFFFF + (pair & 0x100) * 0xFFFF00),)
    return left
