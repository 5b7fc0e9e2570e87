"""Simulated annealing over swaps of two channels, on a full table of what every swap gains.

    place[s, c]   what slot s keeps with channel c in it (less a constant of the slot)      [channels, channels]
    pair[s, t]    place[s, order[t]] + place[t, order[s]], -inf within a group              [channels, channels]
    own[s]        place[s, order[s]]                                                        [channels]

The swap of slots s and t gains ``pair[s, t] - own[s] - own[t]``, so all swaps of a slot are weighed with one vectorised
pass over a row; only a swap that is taken costs (max, +) sums, 2 (M - 1) rows of the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array, below, max_sums, thresholds, uniform


@jit
def fill(columns: Array, order: Array, n: int, m: int, place: Array, pair: Array, own: Array) -> None:
    """Compute the whole table for an order."""
    channels, rows = columns.shape
    slots = np.empty((m, rows), dtype=columns.dtype)
    for start in range(0, channels, m):
        thresholds(columns, order[start : start + m], n, slots)
        max_sums(slots, np.arange(m), columns, np.arange(channels), place[start : start + m])
    for s in range(channels):
        _pairs_of(s, order, m, place, pair, own)


@jit
def _pairs_of(s: Any, order: Array, m: int, place: Array, pair: Array, own: Array) -> None:
    """Refresh row and column s of ``pair`` from ``place``."""
    mine, first = order[s], s // m * m
    own[s] = place[s, mine]
    for t in range(order.shape[0]):
        value = place[s, order[t]] + place[t, mine]
        if first <= t < first + m:
            value = np.float32(-np.inf)
        pair[s, t] = value
        pair[t, s] = value


@jit
def _take(columns: Array, order: Array, n: int, m: int, place: Array, pair: Array, own: Array, s: int, t: int) -> None:
    """Swap the channels of slots s and t and bring the table up to date."""
    order[s], order[t] = order[t], order[s]
    slots = np.empty((2 * m, columns.shape[1]), dtype=columns.dtype)
    changed = np.empty(2 * m, dtype=np.int64)
    for half in range(2):
        start = (t if half else s) // m * m
        thresholds(columns, order[start : start + m], n, slots[half * m : half * m + m])
        for k in range(m):
            changed[half * m + k] = start + k
    # the neighbours of s and t are the same as before, so their own rows of the table stand
    moved, count = np.empty(2 * m - 2, dtype=np.int64), 0
    for k in range(2 * m):
        if changed[k] != s and changed[k] != t:
            moved[count] = k
            count += 1
    sums = np.empty((2 * m - 2, order.shape[0]), dtype=np.float32)
    max_sums(slots, moved, columns, np.arange(order.shape[0]), sums)
    for k in range(2 * m - 2):
        row, new = place[changed[moved[k]]], sums[k]
        for j in range(order.shape[0]):
            row[j] = new[j]
    for slot in changed:
        _pairs_of(slot, order, m, place, pair, own)


@jit
def anneal(
    columns: Array,
    order: Array,
    n: int,
    m: int,
    place: Array,
    pair: Array,
    own: Array,
    best: Array,
    values: Array,
    state: Array,
    temperature: float,
    moves: int,
) -> int:
    """Look at rows of the table, taking swaps, until ``moves`` placements are weighed. Returns how many were.

    A swap of the row drawn is taken where its gain exceeds ``temperature * log(u)``, u uniform and drawn once a row
    (Metropolis, with all partners of a slot tried at once); among several, the first behind a random place.
    best: int64 ``[channels]``, the best order seen; values: float64 ``[2]``, gained so far now and at best.
    """
    channels = order.shape[0]
    spent = 0
    while spent < moves:
        s = below(state, channels)
        least = np.float32(temperature * np.log(uniform(state)) + own[s])
        row = pair[s]
        spent += 1 + channels // 64
        most = np.float32(-np.inf)
        for t in range(channels):
            most = max(most, row[t] - own[t])
        if most <= least:
            continue
        t = below(state, channels)
        while row[t] - own[t] <= least:
            t = t + 1 if t + 1 < channels else 0
        values[0] += row[t] - own[t] - own[s]
        _take(columns, order, n, m, place, pair, own, s, t)
        spent += 2 * (m - 1) * channels
        if values[0] > values[1]:
            values[1] = values[0]
            for i in range(order.shape[0]):
                best[i] = order[i]
    return spent
