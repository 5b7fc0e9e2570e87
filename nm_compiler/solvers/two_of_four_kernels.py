"""Transposable 2:4 masks on 4 x 4 tiles, exactly, by dynamic programming over many tiles side by side.

``values`` float32 or float64 ``[batch, rows, columns]``, contiguous, not negative, both axes multiples of 4; ``out`` uint8.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array

_SIDE_BY_SIDE = 128  # 2:4 tiles that are solved together

_COMBOS = list(itertools.combinations(range(4), 2))  # k and 5 - k complete each other
_FIRST, _SECOND = np.array([a[0] for a in _COMBOS]), np.array([a[1] for a in _COMBOS])
_BITS = [(1 << a[0]) | (1 << a[1]) for a in _COMBOS]
_UPPER = np.array([[one | two << 4 for two in _BITS] for one in _BITS], dtype=np.int32)  # two rows as a mask
_LOWER = _UPPER << 8
_SEVEN = np.array([  # the seven entries, as 4 row + column, of each mask that `two_of_four` speaks of
    [4 * r + c, *(4 * i + j for i, p in zip(rows, permuted, strict=True) for j in permuted if j != p)]
    for r in range(4) for c in range(4)
    for rows in [[i for i in range(4) if i != r]]
    for permuted in itertools.permutations([j for j in range(4) if j != c])
])  # fmt: skip


@jit
def two_of_four(values: Array, out: Array, exactly: bool) -> None:
    """2:4 on 4 x 4 tiles: the best of the 90 masks with two in every row and column.

    Unless ``exactly``: of the masks with at most two, the only others that nothing can be added to leave row r and column
    c with (r, c) alone and drop a permutation of the rest; there are 96 of them, with seven entries.
    """
    tile = np.empty((16, _SIDE_BY_SIDE), values.dtype)
    best, seven = np.empty(_SIDE_BY_SIDE, values.dtype), np.empty(_SIDE_BY_SIDE, values.dtype)
    mask, sums = np.empty(_SIDE_BY_SIDE, np.int32), np.empty((4, 6, _SIDE_BY_SIDE), values.dtype)
    for batch in range(values.shape[0]):
        for row in range(0, values.shape[1], 4):
            for left in range(0, values.shape[2], 4 * _SIDE_BY_SIDE):
                count = min(_SIDE_BY_SIDE, (values.shape[2] - left) // 4)
                for a in range(4):
                    line = values[batch, row + a, left : left + 4 * count]
                    for t in range(count):
                        for b in range(4):
                            tile[4 * a + b, t] = line[4 * t + b]
                _eight(tile, sums, best, mask)
                if not exactly:
                    _seven(tile, seven)
                    for t in range(count):
                        if seven[t] > best[t] * (1 - 1e-5):
                            mask[t] = _better_of(tile, t, mask[t])
                for a in range(4):
                    line = out[batch, row + a, left : left + 4 * count]
                    for t in range(count):
                        for b in range(4):
                            line[4 * t + b] = np.uint8((mask[t] >> (4 * a + b)) & 1)


@jit
def _eight(tile: Array, sums: Array, best: Array, mask: Array) -> None:
    """The best of the 90 masks and its value, for all tiles. sums: scratch.

    The column sums of the upper two rows are 2200, 2110 or 1111 in some order, and the lower rows complete them. If the
    upper rows take combinations i and j in either order, the lower ones take their complements, in either order.
    """
    for a in range(4):
        for t in range(_SIDE_BY_SIDE):
            for k in range(6):
                sums[a, k, t] = tile[4 * a + _FIRST[k], t] + tile[4 * a + _SECOND[k], t]
    for t in range(_SIDE_BY_SIDE):
        most, bits = sums[0, 0, t] + sums[1, 5, t], _UPPER[0, 5]
        for k in range(1, 6):
            value = sums[0, k, t] + sums[1, 5 - k, t]
            bits = _UPPER[k, 5 - k] if value > most else bits
            most = value if value > most else most
        below, lower = sums[2, 0, t] + sums[3, 5, t], _LOWER[0, 5]
        for k in range(1, 6):
            value = sums[2, k, t] + sums[3, 5 - k, t]
            lower = _LOWER[k, 5 - k] if value > below else lower
            below = value if value > below else below
        most += below
        bits |= lower
        for i in range(6):
            for j in range(i, 6):
                if i + j != 5:
                    one, two = sums[0, i, t] + sums[1, j, t], sums[0, j, t] + sums[1, i, t]
                    upper = _UPPER[i, j] if one > two else _UPPER[j, i]
                    one = one if one > two else two
                    three, four = sums[2, 5 - i, t] + sums[3, 5 - j, t], sums[2, 5 - j, t] + sums[3, 5 - i, t]
                    lower = _LOWER[5 - i, 5 - j] if three > four else _LOWER[5 - j, 5 - i]
                    value = one + (three if three > four else four)
                    bits = upper | lower if value > most else bits
                    most = value if value > most else most
        best[t], mask[t] = most, bits


@jit
def _seven(tile: Array, most: Array) -> None:
    """The value of the best of the 96 masks with seven entries, for all tiles."""
    crossed = np.empty((2, 6, _SIDE_BY_SIDE), tile.dtype)
    columns, others = np.empty((4, _SIDE_BY_SIDE), tile.dtype), np.empty(_SIDE_BY_SIDE, tile.dtype)
    for t in range(_SIDE_BY_SIDE):
        for k in range(6):  # the lighter diagonal of two rows in two columns
            i, j = _FIRST[k], _SECOND[k]
            down, up = tile[i, t] + tile[4 + j, t], tile[j, t] + tile[4 + i, t]
            crossed[0, k, t] = down if down < up else up
            down, up = tile[8 + i, t] + tile[12 + j, t], tile[8 + j, t] + tile[12 + i, t]
            crossed[1, k, t] = down if down < up else up
        for c in range(4):
            columns[c, t] = tile[c, t] + tile[4 + c, t] + tile[8 + c, t] + tile[12 + c, t]
        most[t] = 0
    for r in range(4):
        pair, single = 1 - r // 2, r ^ 1  # the rows beside r: the other half, and its neighbour
        for t in range(_SIDE_BY_SIDE):
            others[t] = columns[0, t] + columns[1, t] + columns[2, t] + columns[3, t]
            others[t] -= tile[4 * r, t] + tile[4 * r + 1, t] + tile[4 * r + 2, t] + tile[4 * r + 3, t]
        for t in range(_SIDE_BY_SIDE):
            high = most[t]
            for c in range(4):
                lightest = others[t]  # more than any permutation weighs
                for k in range(6):
                    i, j = _FIRST[k], _SECOND[k]
                    if c != i and c != j:
                        dropped = crossed[pair, k, t] + tile[4 * single + 6 - c - i - j, t]
                        lightest = dropped if dropped < lightest else lightest
                value = others[t] - columns[c, t] + tile[4 * r + c, t] + tile[4 * r + c, t] - lightest
                high = value if value > high else high
            most[t] = high


@jit
def _better_of(tile: Array, t: int, mask: int) -> Any:
    """The better of ``mask`` and of all masks with seven entries, compared in float64. Bits ``4 row + column``."""
    best = 0.0
    for k in range(16):
        if (mask >> k) & 1:
            best += tile[k, t]
    chosen = np.int32(mask)
    for p in range(_SEVEN.shape[0]):
        value, bits = 0.0, 0
        for k in _SEVEN[p]:
            value += tile[k, t]
            bits |= 1 << k
        if value > best:
            best, chosen = value, np.int32(bits)
    return chosen
