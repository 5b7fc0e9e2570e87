"""Compiled top-N of every M: a kernel for each pattern, made when it is first asked for.

The magnitudes of floating numbers, of any width, order like their bits without the sign bit taken as whole numbers; NaN
comes above infinity. So one kernel does for all dtypes. All kernels take

    keys   uint ``[groups, M, inner]``, contiguous: the bits of the weight; a group is ``inner`` groups side by side
    sign   all bits but the sign bit, of the same dtype
    out    uint8 of the same shape, the mask

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
_BLOCK = 64


@cache
def kernel(n: int, m: int, *, single: bool) -> Kernel:
    """The fastest kernel known. single: ``inner`` is 1."""
    if m <= _RANKED_UP_TO:
        return _ranked_single(n, m) if single else _ranked(n, m)
    if n == 1 and single:
        return _largest(m)
    return lambda keys, sign, out: _levels(keys, sign, out, n)


def _ranked_single(n: int, m: int) -> Kernel:
    """Rank of j = how many beat it: no smaller one before, no larger one behind. All groups side by side."""

    @jit
    def ranked_single(keys: Array, sign: Any, out: Array) -> None:
        flat, target = keys.reshape(-1), out.reshape(-1)
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
                target[g * m + j] = np.uint8(rank < n)

    return ranked_single


def _ranked(n: int, m: int) -> Kernel:
    """The same with the numbers of a group ``inner`` apart."""

    @jit
    def ranked(keys: Array, sign: Any, out: Array) -> None:
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
                    target[j, k] = np.uint8(rank < n)

    return ranked


def _largest(m: int) -> Kernel:
    """One of M: the largest, and where several are as large, all but the first are taken back."""

    @jit
    def largest(keys: Array, sign: Any, out: Array) -> None:
        flat, target = keys.reshape(-1), out.reshape(-1)
        for g in range(keys.shape[0]):
            group, kept = flat[g * m : g * m + m], target[g * m : g * m + m]
            most = group[0] & sign
            for j in range(1, m):
                most = max(most, group[j] & sign)
            found = np.int32(0)
            for j in range(m):
                equal = (group[j] & sign) == most
                kept[j] = np.uint8(equal)
                found += np.int32(equal)
            if found > 1:
                first = True
                for j in range(m):
                    if kept[j]:
                        if not first:
                            kept[j] = 0
                        first = False

    return largest


@jit
def _levels(keys: Array, sign: Any, out: Array, n: int) -> None:
    """The n largest of 64 groups at once by insertion; what equals the n-th is kept while there is room."""
    m, inner = keys.shape[1], keys.shape[2]
    flat, target = keys.reshape(-1), out.reshape(-1)
    groups = keys.shape[0] * inner
    block, top = np.empty((m, _BLOCK), keys.dtype), np.empty((n, _BLOCK), keys.dtype)
    falling, room = np.empty(_BLOCK, keys.dtype), np.empty(_BLOCK, np.int32)
    keep, place = np.empty((m, _BLOCK), np.bool_), np.empty(_BLOCK, np.int64)
    for start in range(0, groups, _BLOCK):
        count = min(_BLOCK, groups - start)
        for c in range(count):
            place[c] = (start + c) // inner * (m * inner) + (start + c) % inner
        for j in range(m):
            for c in range(count):
                block[j, c] = flat[place[c] + j * inner] & sign
        top[:] = 0
        for j in range(m):
            falling[:] = block[j]
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
        for c in range(count):
            for j in range(m):
                target[place[c] + j * inner] = np.uint8(keep[j, c])
