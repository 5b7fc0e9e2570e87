"""What both order searches are made of: random numbers, thresholds and (max, +) sums.

The identity behind every score, for any N:M: put channel x into a slot whose M - 1 neighbours have, row by row, the N-th
largest value t_r; then the group keeps ``const + sum_r max(x_r, t_r)``. One threshold row a slot makes every exchange a
sum of maxima.

Everywhere: ``columns`` float32 ``[channels, rows]`` (a channel's values lie side by side), uint8 as made by `coarse` or, for
zeros and ones, packed into uint64 ``[channels, words]``; ``order`` int64 ``[channels]``; ``state`` uint64 ``[1]``, the random
numbers of one search.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from nm_compiler.solvers import packed_kernels as packed
from nm_compiler.solvers.jit import jit

Array = np.ndarray[Any, np.dtype[Any]]

_ROWS = 512  # of a block: four columns of it stay in the first cache


@jit
def random_bits(state: Array) -> Any:
    """The next 64 random bits (splitmix64; Steele, Lea & Flood 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def below(state: Array, bound: int) -> Any:
    """A random whole number, ``0 <= k < bound < 2**32``."""
    return np.int64(((random_bits(state) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@jit
def uniform(state: Array) -> float:
    """A random number in (0, 1)."""
    return (np.float64(random_bits(state) >> np.uint64(12)) + 0.5) * 2.0**-52


@jit
def _plain_thresholds(columns: Array, members: Array, n: int, out: Array) -> None:
    m, rows = members.shape[0], columns.shape[1]
    largest = np.empty((n + 1, _ROWS), dtype=columns.dtype)
    falling = np.empty(_ROWS, dtype=columns.dtype)
    for start in range(0, rows, _ROWS):
        count = min(_ROWS, rows - start)
        largest[:] = 0  # values are not negative
        for j in range(m):
            column = columns[members[j], start : start + count]
            for r in range(count):
                falling[r] = column[r]
            for k in range(n + 1):
                level = largest[k]
                for r in range(count):
                    first, second = level[r], falling[r]
                    level[r] = first if first > second else second
                    falling[r] = second if first > second else first
        nth, spare = largest[n - 1], largest[n]
        for j in range(m):
            column, target = columns[members[j], start : start + count], out[j, start : start + count]
            for r in range(count):
                target[r] = spare[r] if column[r] >= nth[r] else nth[r]


@jit
def _plain_max_sums(slots: Array, chosen: Array, columns: Array, channels: Array, out: Array, zero: Any) -> None:
    # two by two, so that every number loaded is used twice; an odd one out is its own partner
    rows, count, width = slots.shape[1], chosen.shape[0], channels.shape[0]
    out[:] = 0
    for start in range(0, rows, _ROWS):
        stop = min(rows, start + _ROWS)
        for i in range(0, count, 2):
            i2 = min(i + 1, count - 1)
            one, two = slots[chosen[i], start:stop], slots[chosen[i2], start:stop]
            for j in range(0, width, 2):
                j2 = min(j + 1, width - 1)
                left, right = columns[channels[j], start:stop], columns[channels[j2], start:stop]
                a = b = c = d = zero
                for r in range(stop - start):
                    p, q, x, y = one[r], two[r], left[r], right[r]
                    a += p if p > x else x  # max() would widen bytes
                    b += p if p > y else y
                    c += q if q > x else x
                    d += q if q > y else y
                out[i, j] += a
                if j2 > j:
                    out[i, j2] += b
                if i2 > i:
                    out[i2, j] += c
                if i2 > i and j2 > j:
                    out[i2, j2] += d


@jit
def _plain_kept_sum(columns: Array, order: Array, n: int, m: int) -> float:
    rows = columns.shape[1]
    largest = np.empty((n, _ROWS), dtype=np.float32)
    falling = np.empty(_ROWS, dtype=np.float32)
    total = 0.0
    for first in range(0, order.shape[0], m):
        for start in range(0, rows, _ROWS):
            count = min(_ROWS, rows - start)
            largest[:] = 0
            for j in range(first, first + m):
                column = columns[order[j], start : start + count]
                for r in range(count):
                    falling[r] = column[r]
                for k in range(n):
                    level = largest[k]
                    for r in range(count):
                        high, low = max(level[r], falling[r]), min(level[r], falling[r])
                        level[r] = high
                        falling[r] = low
            for k in range(n):
                for r in range(count):
                    total += np.float64(largest[k, r])
    return total


def _is_packed(columns: Any) -> bool:
    return bool(columns.dtype == types.uint64)


def _either_thresholds(columns: Array, members: Array, n: int, out: Array) -> None:
    raise NotImplementedError("resolved when compiled")


def _either_max_sums(slots: Array, chosen: Array, columns: Array, channels: Array, out: Array) -> None:
    raise NotImplementedError("resolved when compiled")


def _either_kept_sum(columns: Array, order: Array, n: int, m: int) -> float:
    raise NotImplementedError("resolved when compiled")


@overload(_either_thresholds, strict=False)
def _(columns: Any, members: Any, n: Any, out: Any) -> Any:
    if _is_packed(columns):
        return lambda columns, members, n, out: packed.thresholds(columns, members, n, out)
    return lambda columns, members, n, out: _plain_thresholds(columns, members, n, out)


@overload(_either_max_sums, strict=False)
def _(slots: Any, chosen: Any, columns: Any, channels: Any, out: Any) -> Any:
    if _is_packed(columns):
        return lambda slots, chosen, columns, channels, out: packed.max_sums(slots, chosen, columns, channels, out)
    kind = np.int32 if columns.dtype == types.uint8 else np.float32  # 512 bytes do not fill 32 bits

    def plain(slots: Array, chosen: Array, columns: Array, channels: Array, out: Array) -> None:
        _plain_max_sums(slots, chosen, columns, channels, out, kind(0))

    return plain


@overload(_either_kept_sum, strict=False)
def _(columns: Any, order: Any, n: Any, m: Any) -> Any:
    if _is_packed(columns):
        return lambda columns, order, n, m: packed.kept_sum(columns, order, n, m)
    return lambda columns, order, n, m: _plain_kept_sum(columns, order, n, m)


@jit
def thresholds(columns: Array, members: Array, n: int, out: Array) -> None:
    """For each of the M channels ``members`` of a group, row by row the n-th largest of the other M - 1.

    out: ``[M, rows]``, of the dtype of ``columns``. An entry among the n largest leaves its place to the (n+1)-th.
    """
    _either_thresholds(columns, members, n, out)


@jit
def max_sums(slots: Array, chosen: Array, columns: Array, channels: Array, out: Array) -> None:
    """``out[i, j] = sum_r max(slots[chosen[i], r], columns[channels[j], r])``: a matrix product over (max, +).

    slots: ``[.., rows]``, of the dtype of ``columns``; chosen, channels: int64; out: ``[len(chosen), len(channels)]``, float32
    or, of bytes, int64.
    """
    _either_max_sums(slots, chosen, columns, channels, out)


@jit
def kept_sum(columns: Array, order: Array, n: int, m: int) -> float:
    """What N:M keeps of all groups under an order, in float64."""
    return _either_kept_sum(columns, order, n, m)


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile, or load, every kernel on a tiny matrix, so that no budget pays for it; dtype: float32, or uint64 for packed."""
    from nm_compiler.solvers import anneal_kernels, neighbourhood_kernels

    columns = np.ones((4, 3), dtype=dtype)
    order, state = np.arange(4), np.zeros(1, dtype=np.uint64)
    kept_sum(columns, order, 1, 2)
    table = np.empty((2, 4, 4), dtype=np.float32)
    tables = (table[0], table[1], np.empty(4, dtype=np.float32))
    anneal_kernels.fill(columns, order, 1, 2, *tables)
    anneal_kernels.anneal(columns, order, 1, 2, *tables, order.copy(), np.zeros(2), state, 1e-6, 1)
    for each in {dtype, np.dtype(np.uint8)} if dtype == np.float32 else {dtype}:
        neighbourhood_kernels.warm_up(each)
