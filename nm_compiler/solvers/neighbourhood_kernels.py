"""One round of the large neighbourhood: take a random slot out of many groups and refill them all at once, optimally.

The slots lie in different groups, so what each keeps does not depend on the others: a linear assignment problem.
Ref: RIA's use of linear sum assignment (Zhang et al., 2024), iterated and made noisy here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array, below, max_sums, thresholds, uniform


@jit
def rebuild(
    columns: Array, order: Array, n: int, m: int, groups: Array, state: Array, count: int, noise: float, scores: Array
) -> Any:
    """Refill one random slot of ``count`` random groups. Returns what that gained (a loss, under noise).

    groups: int64 ``[channels / m]``, a permutation that the draw may shuffle; scores: scratch, float32 ``[count, count]``.
    noise: scale of the Gumbel noise that is added to the scores before they are assigned.
    """
    rows = columns.shape[1]
    slots, neighbours = np.empty((count, rows), dtype=columns.dtype), np.empty((m, rows), dtype=columns.dtype)
    places, channels = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    for k in range(count):
        other = k + below(state, groups.shape[0] - k)
        groups[k], groups[other] = groups[other], groups[k]
        slot = below(state, m)
        start = groups[k] * m
        thresholds(columns, order[start : start + m], n, neighbours)
        slots[k] = neighbours[slot]
        places[k] = start + slot
        channels[k] = order[start + slot]
    max_sums(slots, np.arange(count), columns, channels, scores)
    cost = np.empty((count, count), dtype=np.float64)
    for i in range(count):
        for j in range(count):
            cost[i, j] = -scores[i, j]
    if noise > 0:
        for i in range(count):
            for j in range(count):
                cost[i, j] += noise * np.log(-np.log(uniform(state)))
    chosen = assign(cost)
    gained = 0.0
    for k in range(count):
        gained += scores[k, chosen[k]] - scores[k, k]
    if noise > 0 or gained > 0:
        for k in range(count):
            order[places[k]] = channels[chosen[k]]
    else:
        gained = 0.0
    return gained


@jit
def assign(cost: Array) -> Any:
    """The cheapest assignment of columns to rows of a square matrix, float64 ``[k, k]``. Returns int64 ``[k]``, by row.

    Shortest augmenting paths after a column reduction and two passes of row reduction.
    Ref: Jonker & Volgenant, Computing 38 (1987).
    """
    size = cost.shape[0]
    column_of = np.full(size, -1, dtype=np.int64)
    row_of = np.full(size, -1, dtype=np.int64)
    price = np.empty(size, dtype=np.float64)
    for j in range(size):
        price[j] = cost[0, j]
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
    for k in range(left):
        _augment(cost, price, column_of, row_of, free[k])
    return column_of


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
def _augment(cost: Array, price: Array, column_of: Array, row_of: Array, start: int) -> None:
    """Assign one more row along the shortest alternating path (Dijkstra over reduced costs)."""
    size = cost.shape[0]
    distance = np.empty(size, dtype=np.float64)
    before = np.full(size, start, dtype=np.int64)
    done = np.zeros(size, dtype=np.bool_)
    for j in range(size):
        distance[j] = cost[start, j] - price[j]
    while True:
        nearest, last = np.inf, -1
        for j in range(size):
            if not done[j] and (distance[j] < nearest or (distance[j] == nearest and row_of[j] < 0)):
                nearest, last = distance[j], j
        done[last] = True
        if row_of[last] < 0:
            break
        i = row_of[last]
        base = nearest - (cost[i, last] - price[last])
        for j in range(size):
            if not done[j]:
                through = base + cost[i, j] - price[j]
                if through < distance[j]:
                    distance[j] = through
                    before[j] = i
    for j in range(size):
        if done[j]:
            price[j] += distance[j] - nearest
    while True:
        i = before[last]
        row_of[last] = i
        last, column_of[i] = column_of[i], last
        if i == start:
            break
