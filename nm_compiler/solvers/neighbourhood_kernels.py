"""One round of the large neighbourhood: take a random slot out of many groups and refill them all at once, optimally.

The slots lie in different groups, so what each keeps does not depend on the others: a linear assignment problem.
Ref: RIA's use of linear sum assignment (Zhang et al., 2024), iterated and made noisy here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit, jit_finite
from nm_compiler.solvers.search_kernels import Array, below, max_sums, thresholds, uniform


@jit
def draw(columns: Array, order: Array, n: int, m: int, groups: Array, state: Array, slots: Array, places: Array) -> None:
    """Choose one random slot of as many random groups as there are ``places``, int64; they lie in different groups.

    groups: int64 ``[channels / m]``, a permutation that the draw shuffles; slots: ``[places, rows]``, of the dtype of
    ``columns``, becomes what the neighbours of every slot leave over.
    """
    neighbours = np.empty((m, columns.shape[1]), dtype=columns.dtype)
    for k in range(places.shape[0]):
        other = k + below(state, groups.shape[0] - k)
        groups[k], groups[other] = groups[other], groups[k]
        slot = below(state, m)
        start = groups[k] * m
        thresholds(columns, order[start : start + m], n, neighbours)
        slots[k] = neighbours[slot]
        places[k] = start + slot


@jit
def weigh(slots: Array, columns: Array, channels: Array, scores: Array) -> None:
    """``scores[i, j]``: what the channel j keeps in the slot i, but for a constant of the slot's group."""
    max_sums(slots, np.arange(slots.shape[0]), columns, channels, scores)


@jit
def refill(order: Array, places: Array, scores: Array, noise: float, state: Array) -> Any:
    """Fill the places with the channels that lie in them, as the scores say is best. Returns what that gained (a loss, under
    noise), in units of the scores.

    noise: scale of the Gumbel noise that is added to the scores before they are assigned; without it nothing may get worse.
    """
    count = places.shape[0]
    channels = order[places]
    cost = np.empty((count, count), dtype=np.float64)
    for i in range(count):
        for j in range(count):
            cost[i, j] = -np.float64(scores[i, j])
    if noise > 0:
        for i in range(count):
            for j in range(count):
                cost[i, j] += noise * np.log(-np.log(uniform(state)))
    chosen = assign(cost)
    gained = 0.0
    for k in range(count):
        gained += np.float64(scores[k, chosen[k]]) - np.float64(scores[k, k])
    if noise > 0 or gained > 0:
        for k in range(count):
            order[places[k]] = channels[chosen[k]]
    else:
        gained = 0.0
    return gained


@jit_finite
def lowest(values: Array) -> Any:
    """The smallest of finite numbers, infinity among them."""
    low = values[0]
    for j in range(values.shape[0]):
        low = min(low, values[j])
    return low


@jit
def assign(cost: Array) -> Any:
    """The cheapest assignment of columns to rows of a square matrix, float64 ``[k, k]``, which is written over. Returns int64
    ``[k]``, by row.

    Shortest augmenting paths after a column reduction and two passes of row reduction; both leave little to do once the rows
    and columns have lost what they cost in the mean, which decides nothing.
    Ref: Jonker & Volgenant, Computing 38 (1987).
    """
    size = cost.shape[0]
    _level(cost)
    column_of = np.full(size, -1, dtype=np.int64)
    row_of = np.full(size, -1, dtype=np.int64)
    price = cost[0].copy()
    cheapest = np.zeros(size, dtype=np.int64)
    for i in range(1, size):
        for j in range(size):
            if cost[i, j] < price[j]:
                price[j] = cost[i, j]
                cheapest[j] = i
    for j in range(size - 1, -1, -1):
        if column_of[cheapest[j]] < 0:
            column_of[cheapest[j]] = j
            row_of[j] = cheapest[j]
    free = np.empty(size, dtype=np.int64)
    left = 0
    for i in range(size):
        if column_of[i] < 0:
            free[left] = i
            left += 1
    for _ in range(2):
        left = _reduce_rows(cost, price, column_of, row_of, free, left)
    distance, open_, before = np.empty(size), np.empty(size), np.empty(size, dtype=np.int64)
    for k in range(left):
        _augment(cost, price, column_of, row_of, free[k], distance, open_, before)
    return column_of


@jit
def _level(cost: Array) -> None:
    """Take the mean from every column, then from every row, then the lowest from every row."""
    size = cost.shape[0]
    mean = np.zeros(size)
    for i in range(size):
        for j in range(size):
            mean[j] += cost[i, j]
    for j in range(size):
        mean[j] /= size
    for i in range(size):
        own = 0.0
        for j in range(size):
            cost[i, j] -= mean[j]
            own += cost[i, j]
        own /= size
        for j in range(size):
            cost[i, j] -= own
        low = lowest(cost[i])
        for j in range(size):
            cost[i, j] -= low


@jit
def _reduce_rows(cost: Array, price: Array, column_of: Array, row_of: Array, free: Array, left: int) -> int:
    """Give every free row its best column at a lower price; who held it becomes free. Returns how many are free."""
    size = cost.shape[0]
    still, k, tries = 0, 0, 0
    while k < left:
        i = free[k]
        k += 1
        best = second = np.inf
        j1, j2 = 0, 0
        for j in range(size):
            reduced = cost[i, j] - price[j]
            if reduced < second:
                if reduced < best:
                    second, j2 = best, j1
                    best, j1 = reduced, j
                else:
                    second, j2 = reduced, j
        tries += 1
        if tries > 4 * size:  # rounding could trade one column back and forth for ever; augmenting does the rest
            free[still] = i
            still += 1
            continue
        holder = row_of[j1]
        if best < second:
            price[j1] -= second - best
            if holder >= 0:  # it looks again at once
                k -= 1
                free[k] = holder
        elif holder >= 0 and size > 1:
            j1 = j2
            holder = row_of[j1]
            if holder >= 0:
                free[still] = holder
                still += 1
        if holder >= 0:
            column_of[holder] = -1
        row_of[j1] = i
        column_of[i] = j1
    return still


@jit
def _augment(
    cost: Array, price: Array, column_of: Array, row_of: Array, start: int, distance: Array, open_: Array, before: Array
) -> None:
    """Assign one more row along the shortest alternating path (Dijkstra over reduced costs, which are not negative).

    distance, open_, before: scratch. Loops without branches, since this is where the time goes.
    """
    size = cost.shape[0]
    for j in range(size):
        distance[j] = open_[j] = cost[start, j] - price[j]  # open_: infinite once the distance is final
        before[j] = start
    while True:
        nearest, last = lowest(open_), 0
        while open_[last] != nearest:
            last += 1
        open_[last] = np.inf
        if row_of[last] < 0:
            break
        i = row_of[last]
        row = cost[i]
        base = nearest - (row[last] - price[last])
        for j in range(size):
            through = base + row[j] - price[j]
            shorter = (through < distance[j]) & (open_[j] < np.inf)
            distance[j] = through if shorter else distance[j]
            open_[j] = through if shorter else open_[j]
            before[j] = i if shorter else before[j]
    for j in range(size):
        price[j] += min(0.0, distance[j] - nearest)
    while True:
        i = before[last]
        row_of[last] = i
        last, column_of[i] = column_of[i], last
        if i == start:
            break


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile, or load, every kernel on a tiny matrix; dtype: of the columns."""
    columns = np.ones((4, 3), dtype=dtype)
    order, places, state = np.arange(4), np.empty(2, dtype=np.int64), np.zeros(1, dtype=np.uint64)
    slots = np.empty((2, 3), dtype=dtype)
    scores = np.empty((2, 2), dtype=np.int64 if dtype == np.uint8 else np.float32)
    draw(columns, order, 1, 2, np.arange(2), state, slots, places)
    weigh(slots, columns, order[places], scores)
    refill(order, places, scores, 0.0, state)
