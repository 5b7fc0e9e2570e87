"""Transposable N:M masks on M x M tiles, exactly, by minimum-cost flow, a tile at a time.

``values`` float64 ``[batch, rows, columns]``, contiguous, not negative, both axes multiples of M; ``out`` uint8 of the shape.
"""

from __future__ import annotations

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array


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
    fullest = counts[0]
    for j in range(1, m):
        fullest = max(fullest, counts[j])
    if fullest <= n:
        return False
    to_row, to_column = length[0], length[1]
    from_column, from_row = before[0], before[1]
    done_row, done_column = done[0], done[1]
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
    weights: Array, chosen: Array, row_price: Array, column_price: Array, most: float, length: Array, before: Array,
    done: Array,
) -> bool:  # fmt: skip
    """Leave one row and one column with an entry less, if the best way to do so gains. False if it does not.

    A path begins at any row, which drops an entry; its column may choose another row, which drops one of its own.
    length, before, done: scratch as in `_move_one`.
    """
    m = weights.shape[0]
    cheapest_row, cheapest_column = row_price[0], column_price[0]
    for k in range(1, m):
        cheapest_row, cheapest_column = min(cheapest_row, row_price[k]), min(cheapest_column, column_price[k])
    if cheapest_row + cheapest_column >= -1e-12 * most:
        return False
    to_row, to_column = length[0], length[1]
    from_column, from_row = before[0], before[1]
    done_row, done_column = done[0], done[1]
    length[:], before[:], done[:] = np.inf, -1, False
    for i in range(m):
        for j in range(m):
            if chosen[i, j]:
                to_row[i] = row_price[i] - cheapest_row
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
