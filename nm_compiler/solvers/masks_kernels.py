"""Compiled top-N of every M: a kernel for each pattern, made when it is first asked for.

The magnitudes of floating numbers, of any width, order like their bits without the sign bit taken as whole numbers; NaN
comes above infinity. So one kernel does for all dtypes. All kernels take

    keys   uint ``[groups, M, inner]``, contiguous: the bits of the weight; a group is ``inner`` groups side by side
    sign   all bits but the sign bit, of the same dtype
    out    of the same shape: uint8, the mask, or of the keys' dtype, the bits of the masked weight

and keep the lower index among equals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array

Kernel = Callable[[Array, Any, Array], None]

_RANKED_UP_TO = 8  # beyond, M(M-1) comparisons cost more than keeping the N largest of a block of groups
_LARGEST_FROM = 8  # from here on, looking for the largest of M costs less than comparing all with all
_ACROSS = 64  # groups side by side, from where they are compared a row with a row
_BLOCK, _WIDE = 64, 256


def kernel(n: int, m: int, *, inner: int, values: bool) -> Kernel:
    """The fastest kernel known. values: it writes the masked weight, not the mask."""
    if inner >= _ACROSS:
        return lambda keys, sign, out: _side_by_side(keys, sign, out, n, values)
    if n == 1 and inner == 1 and m >= _LARGEST_FROM:
        return _largest(m, values)
    if m <= _RANKED_UP_TO:
        return _ranked_single(n, m, values) if inner == 1 else _ranked(n, m, values)
    return lambda keys, sign, out: _levels(keys, sign, out, n, values)


@cache
def _ranked_single(n: int, m: int, values: bool) -> Kernel:
    """Rank of j = how many beat it: no smaller one before, no larger one behind. All groups side by side."""

    @jit
    def ranked_single(keys: Array, sign: Any, out: Array) -> None:
        flat, target, zero = keys.reshape(-1), out.reshape(-1), keys.dtype.type(0)
        for g in range(keys.shape[0]):
            for j in range(m):
                mine = flat[g * m + j] & sign
                rank = np.int32(0)
                for i in range(m):
                    other = flat[g * m + i] & sign
                    if i < j:
                        rank += np.int32(other >= mine)
                    elif i > j:
                        rank += np.int32(other > mine)
                if values:
                    target[g * m + j] = flat[g * m + j] if rank < n else zero
                else:
                    target[g * m + j] = np.uint8(rank < n)

    return ranked_single


@cache
def _ranked(n: int, m: int, values: bool) -> Kernel:
    """The same with the numbers of a group ``inner`` apart."""

    @jit
    def ranked(keys: Array, sign: Any, out: Array) -> None:
        zero = keys.dtype.type(0)  # uint64 and a plain 0 would make a float
        for g in range(keys.shape[0]):
            group, target = keys[g], out[g]
            for k in range(keys.shape[2]):
                for j in range(m):
                    mine = group[j, k] & sign
                    rank = np.int32(0)
                    for i in range(m):
                        other = group[i, k] & sign
                        if i < j:
                            rank += np.int32(other >= mine)
                        elif i > j:
                            rank += np.int32(other > mine)
                    if values:
                        target[j, k] = group[j, k] if rank < n else zero
                    else:
                        target[j, k] = np.uint8(rank < n)

    return ranked


@cache
def _largest(m: int, values: bool) -> Kernel:
    """One of M. ``high[i]`` becomes the largest from i to i + M - 1, by passes that are plain vectors; i = g M is group g."""
    length = _BLOCK * m

    @jit
    def largest(keys: Array, sign: Any, out: Array) -> None:
        flat, target, zero = keys.reshape(-1), out.reshape(-1), keys.dtype.type(0)
        high, spread = np.zeros(length + m, keys.dtype), np.empty(length, keys.dtype)
        for start in range(0, flat.size, length):
            size = min(length, flat.size - start)
            part, kept = flat[start : start + size], target[start : start + size]
            for i in range(size):
                high[i] = part[i] & sign
            wide = 1
            while wide < m:
                step = min(wide, m - wide)
                for i in range(size):
                    here, there = high[i], high[i + step]
                    high[i] = here if here > there else there
                wide += step
            for g in range(size // m):
                most = high[g * m]
                for j in range(m):
                    spread[g * m + j] = most
            found = np.int32(0)
            for i in range(size):
                equal = (part[i] & sign) == spread[i]
                if values:
                    kept[i] = part[i] if equal else zero
                else:
                    kept[i] = np.uint8(equal)
                found += np.int32(equal)
            if found > size // m:  # some group has several as large: the first stays
                for g in range(size // m):
                    first = True
                    for i in range(g * m, g * m + m):
                        if (part[i] & sign) == spread[i]:
                            if not first:
                                kept[i] = 0
                            first = False

    return largest


@jit
def _side_by_side(keys: Array, sign: Any, out: Array, n: int, values: bool) -> None:
    """Rank as above, each of the M(M-1)/2 comparisons for 256 neighbouring groups at once."""
    m, inner = keys.shape[1], keys.shape[2]
    kind, zero = keys.dtype.type, keys.dtype.type(0)
    size, rank = np.empty((m, _WIDE), keys.dtype), np.empty((m, _WIDE), keys.dtype)
    for g in range(keys.shape[0]):
        for start in range(0, inner, _WIDE):
            count = min(_WIDE, inner - start)
            for j in range(m):
                row, here, beaten = keys[g, j, start : start + count], size[j], rank[j]
                for k in range(count):
                    here[k] = row[k] & sign
                    beaten[k] = m - 1 - j
            for i in range(m):
                here, beaten = size[i], rank[i]
                for j in range(i + 1, m):
                    there, beaten_there = size[j], rank[j]
                    for k in range(count):
                        first = kind(here[k] >= there[k])
                        beaten[k] -= first
                        beaten_there[k] += first
            for j in range(m):
                row, kept, beaten = keys[g, j, start : start + count], out[g, j, start : start + count], rank[j]
                if values:
                    for k in range(count):
                        kept[k] = row[k] if beaten[k] < n else zero
                else:
                    for k in range(count):
                        kept[k] = np.uint8(beaten[k] < n)


@jit
def _levels(keys: Array, sign: Any, out: Array, n: int, values: bool) -> None:
    """The n largest of 64 groups at once by insertion; what equals the n-th is kept while there is room."""
    m, inner = keys.shape[1], keys.shape[2]
    flat, target = keys.reshape(-1), out.reshape(-1)
    groups = keys.shape[0] * inner
    block, top = np.empty((m, _BLOCK), keys.dtype), np.empty((n, _BLOCK), keys.dtype)
    falling, room = np.empty(_BLOCK, keys.dtype), np.empty(_BLOCK, np.int32)
    keep, place, marks = np.empty((m, _BLOCK), np.bool_), np.empty(_BLOCK, np.int64), np.empty(_BLOCK * m, np.uint8)
    for start in range(0, groups, _BLOCK):
        count = min(_BLOCK, groups - start)
        for c in range(count):
            place[c] = (start + c) // inner * (m * inner) + (start + c) % inner
        for j in range(m):
            for c in range(count):
                block[j, c] = flat[place[c] + j * inner] & sign
        top[:] = 0
        for j in range(m):
            for c in range(_BLOCK):
                falling[c] = block[j, c]
            for level in range(n):
                for c in range(_BLOCK):
                    high, low = max(top[level, c], falling[c]), min(top[level, c], falling[c])
                    top[level, c] = high
                    falling[c] = low
        room[:] = n
        for j in range(m):
            for c in range(_BLOCK):
                room[c] -= np.int32(block[j, c] > top[n - 1, c])
        for j in range(m):
            for c in range(_BLOCK):
                tied = block[j, c] == top[n - 1, c] and room[c] > 0
                room[c] -= np.int32(tied)
                keep[j, c] = tied or block[j, c] > top[n - 1, c]
        if values and inner == 1:
            for c in range(count):
                for j in range(m):
                    marks[c * m + j] = np.uint8(keep[j, c])
            for i in range(count * m):
                target[start * m + i] = flat[start * m + i] * marks[i]
            continue
        for c in range(count):
            for j in range(m):
                at = place[c] + j * inner
                if values:
                    target[at] = flat[at] * np.uint8(keep[j, c])  # a branch would be mispredicted
                else:
                    target[at] = np.uint8(keep[j, c])
