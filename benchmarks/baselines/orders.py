"""Orders of channels as others search them, with the same compiled inner loops as ours: what differs is the algorithm.

matrix: float32 ``[rows, channels]``; orders are int64 ``[channels]``.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search import snake
from nm_compiler.solvers.search_kernels import kept_sum, max_sums, thresholds

Array = np.ndarray[Any, np.dtype[Any]]


def better_start(columns: Array, n: int, m: int) -> Array:
    """The better of the identity and the snake."""
    identity, dealt = np.arange(len(columns)), snake(columns, m)
    return dealt if kept_sum(columns, dealt, n, m) > kept_sum(columns, identity, n, m) else identity


def hill_climb(matrix: Array, n: int, m: int) -> Array:
    """Swap pairs of channels while any swap gains: all swaps weighed, the best ones of disjoint groups taken, again.

    Ref: channel_swap of Pool & Yu (NeurIPS 2021) and of apex, from the better of identity and snake, any N:M.
    """
    columns = np.ascontiguousarray(matrix.T)
    order = better_start(columns, n, m)
    channels, rows = columns.shape
    place = np.empty((channels, channels), dtype=np.float32)
    slots = np.empty((m, rows), dtype=np.float32)
    stale = range(channels // m)
    group = np.arange(channels) // m
    while True:
        for g in stale:
            thresholds(columns, order[g * m : g * m + m], n, slots)
            max_sums(slots, np.arange(m), columns, np.arange(channels), place[g * m : g * m + m])
        here = place[:, order]  # slot s with the channel of slot t
        own = here.diagonal()
        gain = here + here.T - own[:, None] - own[None, :]
        gain[group[:, None] >= group[None, :]] = 0
        s, t = np.nonzero(gain > 1e-4 * own.mean())
        taken: set[int] = set()
        for k in np.argsort(-gain[s, t], kind="stable"):
            groups = {int(group[s[k]]), int(group[t[k]])}
            if not groups & taken:
                order[s[k]], order[t[k]] = order[t[k]], order[s[k]]
                taken |= groups
        if not taken:
            return order
        stale = sorted(taken)  # type: ignore[assignment]


def stripe_groups(matrix: Array, n: int, m: int) -> Array:
    """Every way to share the channels of two groups out anew, the best pairs of groups first, while anything gains.

    Ref: Exhaustive_Search of apex with windows of two groups (8 channels for 2:4) and no escapes.
    """
    columns = np.ascontiguousarray(matrix.T)
    order = better_start(columns, n, m)
    count = len(order) // m
    splits = np.array(
        [[0, *half, *(c for c in range(1, 2 * m) if c not in half)] for half in itertools.combinations(range(1, 2 * m), m - 1)]
    )
    gains, best = np.zeros((count, count), dtype=np.float64), np.zeros((count, count), dtype=np.int64)
    stale = np.ones(count, dtype=np.bool_)
    limit = 1e-6 * float(kept_sum(columns, order, n, m)) / count
    while True:
        _weigh(columns, order, n, m, splits, stale, gains, best)
        stale[:] = False
        one, two = np.nonzero(gains > limit)
        for k in np.argsort(-gains[one, two], kind="stable"):
            i, j = one[k], two[k]
            if stale[i] or stale[j]:
                continue
            slots = np.concatenate([np.arange(i * m, i * m + m), np.arange(j * m, j * m + m)])
            order[slots] = order[slots[splits[best[i, j]]]]
            stale[[i, j]] = True
        if not stale.any():
            return order


@jit
def _weigh(columns: Array, order: Array, n: int, m: int, splits: Array, stale: Array, gains: Array, best: Array) -> None:
    count = order.shape[0] // m
    window, both = np.empty(2 * m, dtype=np.int64), np.empty(2 * m, dtype=np.int64)
    for i in range(count):
        for j in range(i + 1, count):
            if not (stale[i] or stale[j]):
                continue
            for k in range(m):
                window[k], window[m + k] = order[i * m + k], order[j * m + k]
            before = kept_sum(columns, window, n, m)
            gains[i, j] = 0.0
            for s in range(splits.shape[0]):
                for k in range(2 * m):
                    both[k] = window[splits[s, k]]
                gain = kept_sum(columns, both, n, m) - before
                if gain > gains[i, j]:
                    gains[i, j], best[i, j] = gain, s


def assignment(matrix: Array, n: int, m: int, budget_s: float) -> Array:
    """Refill one slot of every group at once by linear assignment, slot after slot, until the time is up or nothing gains.

    Ref: channel permutation of RIA (Zhang et al., ICLR 2024), which does so once after its snake; repeated here.
    """
    end = time.perf_counter() + budget_s
    columns = np.ascontiguousarray(matrix.T)
    order = better_start(columns, n, m)
    count, idle = len(order) // m, 0
    slots, neighbours = (np.empty((k, columns.shape[1]), dtype=np.float32) for k in (count, m))
    scores = np.empty((count, count), dtype=np.float32)
    for slot in itertools.cycle(range(m)):
        for g in range(count):
            thresholds(columns, order[g * m : g * m + m], n, neighbours)
            slots[g] = neighbours[slot]
        here = order[slot::m].copy()
        max_sums(slots, np.arange(count), columns, here, scores)
        _, chosen = linear_sum_assignment(scores, maximize=True)
        gained = scores[np.arange(count), chosen].sum(dtype=np.float64) - scores.trace(dtype=np.float64)
        if gained > 1e-6 * scores.trace():
            order[slot::m] = here[chosen]
            idle = 0
        else:
            idle += 1
        if idle >= m or time.perf_counter() > end:
            break
    return order
