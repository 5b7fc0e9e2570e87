"""Transposable masks tile by tile: exact for 2:4 by dynamic programming, for any N:M by minimum-cost flow.

All kernels take ``values`` float32 or float64 ``[batch, rows, columns]``, contiguous, not negative, both axes multiples
of M, and write ``out`` uint8 of the same shape.
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


def comparators(n: int, m: int) -> Array:
    """Pairs to compare and exchange, int64 ``[count, 2]``, that bring the n + 1 largest of m to the front, the largest first.

    Batcher's merge sort, or for small n bubbles: whichever compares less. Ref: Batcher, AFIPS 1968.
    """
    sort, width = [], 1
    while width < m:
        step = width
        while step >= 1:
            for low in range(step % width, m - step, 2 * step):
                for a in range(low, min(low + step, m - step)):
                    if a // (2 * width) == (a + step) // (2 * width):
                        sort.append((a, a + step))
            step //= 2
        width *= 2
    bubbles = [(j - 1, j) for k in range(min(n + 1, m - 1)) for j in range(m - 1, k, -1)]
    return np.array(min(sort, bubbles, key=len), dtype=np.int64)


@jit
def any_of_any(values: Array, out: Array, n: int, m: int, exactly: bool, pairs: Array) -> None:
    """N:M on M x M tiles: the transportation problem with capacities N and 1, solved exactly in float64.

    Prices of rows and columns come from a few rounds of coordinate descent on the dual; every row then takes its n best,
    and shortest paths repair the columns that got too many or too few. The result is the best mask with n in every row
    and column. Unless ``exactly``, entries are taken out again along shortest paths while that pays. pairs: `comparators`.
    """
    weights, turned = np.empty((m, m)), np.empty((m, m))
    chosen = np.empty((m, m), np.bool_)
    row_price, column_price = np.empty(m, np.float64), np.empty(m, np.float64)
    work, precise = np.empty((m, m), np.float32), np.empty((m, m), np.float64)
    counts = np.empty(m, np.int64)
    length, before, done = np.empty((2, m)), np.empty((2, m), np.int64), np.empty((2, m), np.bool_)
    for batch in range(values.shape[0]):
        for top in range(0, values.shape[1], m):
            for left in range(0, values.shape[2], m):
                most = 0.0
                for i in range(m):
                    for j in range(m):
                        weights[i, j] = turned[j, i] = values[batch, top + i, left + j]
                        most = max(most, weights[i, j])
                column_price[:] = 0
                for _ in range(2 + m // 8):  # more rounds for large tiles, which have more to repair
                    _price(turned, column_price, n, pairs, work, row_price)
                    _price(weights, row_price, n, pairs, work, column_price)
                _price(turned, column_price, n, pairs, precise, row_price)
                counts[:] = 0
                for i in range(m):
                    taken = 0
                    for j in range(m):
                        chosen[i, j] = weights[i, j] - column_price[j] > row_price[i]
                        taken += chosen[i, j]
                    for j in range(m):  # what equals the price, until the row is full
                        if taken < n and not chosen[i, j] and weights[i, j] - column_price[j] == row_price[i]:
                            chosen[i, j] = True
                            taken += 1
                    for j in range(m):
                        counts[j] += chosen[i, j]
                while _move_one(weights, chosen, row_price, column_price, counts, n, length, before, done):
                    pass
                if not exactly:
                    while _drop_one(weights, chosen, row_price, column_price, most, length, before, done):
                        pass
                for i in range(m):
                    for j in range(m):
                        out[batch, top + i, left + j] = chosen[i, j]


@jit
def _price(weights: Array, other: Array, n: int, pairs: Array, work: Array, out: Array) -> None:
    """Halfway between the n-th and the next largest of ``weights[:, i] - other``, for every column i.

    All columns side by side, in the dtype of ``work`` (scratch, ``[m, m]``): float32 will do but for the last round, whose
    prices decide which n of a row are chosen.
    """
    m = weights.shape[0]
    for j in range(m):
        line, source, price = work[j], weights[j], other[j]
        for i in range(m):
            line[i] = source[i] - price
    for k in range(pairs.shape[0]):
        above, below = work[pairs[k, 0]], work[pairs[k, 1]]
        for i in range(m):
            high, low = max(above[i], below[i]), min(above[i], below[i])
            above[i] = high
            below[i] = low
    for i in range(m):
        out[i] = work[n, i] + 0.5 * (np.float64(work[n - 1, i]) - work[n, i])


@jit
def _move_one(
    weights: Array, chosen: Array, row_price: Array, column_price: Array, counts: Array, n: int, length: Array, before: Array,
    done: Array,
) -> bool:  # fmt: skip
    """Move one entry from a column with too many to one with too few, by the shortest path. False if there is none.

    A step drops a chosen entry of a column and lets its row choose another; its length is what the prices say it loses.
    length, before, done: scratch, ``[2, m]``: of rows, of columns.
    """
    m = weights.shape[0]
    if counts.max() <= n:
        return False
    to_row, to_column, from_column, from_row, done_row, done_column = (
        length[0],
        length[1],
        before[0],
        before[1],
        done[0],
        done[1],
    )
    length[:], before[:], done[:] = np.inf, -1, False
    for j in range(m):
        if counts[j] > n:
            to_column[j] = 0.0
    while True:
        column, row, nearest = -1, -1, np.inf
        for j in range(m):
            if not done_column[j] and to_column[j] < nearest:
                nearest, column = to_column[j], j
        for i in range(m):
            if not done_row[i] and to_row[i] < nearest:
                nearest, row, column = to_row[i], i, -1
        if row >= 0:
            done_row[row] = True
            for j in range(m):
                if not chosen[row, j] and not done_column[j]:
                    reach = nearest - (weights[row, j] - row_price[row] - column_price[j])
                    if reach < to_column[j]:
                        to_column[j], from_row[j] = reach, row
        else:
            if counts[column] < n:
                break
            done_column[column] = True
            for i in range(m):
                if chosen[i, column] and not done_row[i]:
                    reach = nearest + (weights[i, column] - row_price[i] - column_price[column])
                    if reach < to_row[i]:
                        to_row[i], from_column[i] = reach, column
    for k in range(m):
        row_price[k] += min(to_row[k], nearest)
        column_price[k] -= min(to_column[k], nearest)
    counts[column] += 1
    while from_row[column] >= 0:
        row = from_row[column]
        chosen[row, column] = True
        column = from_column[row]
        chosen[row, column] = False
    counts[column] -= 1
    return True


@jit
def _drop_one(
    weights: Array,
    chosen: Array,
    row_price: Array,
    column_price: Array,
    most: float,
    length: Array,
    before: Array,
    done: Array,
) -> bool:
    """Leave one row and one column with an entry less, if the best way to do so gains. False if it does not.

    A path begins at any row, which drops an entry; its column may choose another row, which drops one of its own.
    length, before, done: scratch as in `_move_one`.
    """
    m = weights.shape[0]
    cheapest_row, cheapest_column = row_price.min(), column_price.min()
    if cheapest_row + cheapest_column >= -1e-12 * most:
        return False
    to_row, to_column, from_column, from_row, done_row, done_column = (
        length[0],
        length[1],
        before[0],
        before[1],
        done[0],
        done[1],
    )
    length[:], before[:], done[:] = np.inf, -1, False
    to_row[:] = row_price - cheapest_row
    for i in range(m):
        if not chosen[i].any():
            to_row[i] = np.inf
    end, total = -1, np.inf
    while True:
        column, row, nearest = -1, -1, np.inf
        for i in range(m):
            if not done_row[i] and to_row[i] < nearest:
                nearest, row = to_row[i], i
        for j in range(m):
            if not done_column[j] and to_column[j] < nearest:
                nearest, column, row = to_column[j], j, -1
        if nearest >= total:
            break
        if row >= 0:
            done_row[row] = True
            for j in range(m):
                if chosen[row, j] and not done_column[j]:
                    reach = nearest + (weights[row, j] - row_price[row] - column_price[j])
                    if reach < to_column[j]:
                        to_column[j], from_row[j] = reach, row
        else:
            done_column[column] = True
            if nearest + column_price[column] - cheapest_column < total:
                total, end = nearest + column_price[column] - cheapest_column, column
            for i in range(m):
                if not chosen[i, column] and not done_row[i]:
                    reach = nearest - (weights[i, column] - row_price[i] - column_price[column])
                    if reach < to_row[i]:
                        to_row[i], from_column[i] = reach, column
    if total + cheapest_row + cheapest_column >= -1e-12 * most:
        return False
    for k in range(m):
        row_price[k] -= min(to_row[k], total)
        column_price[k] += min(to_column[k], total)
    while True:
        row = from_row[end]
        chosen[row, end] = False
        end = from_column[row]
        if end < 0:
            return True
        chosen[row, end] = True
