"""Bi-Mask's backward order: which output rows share a backward group.

A simple pair-swap hill climb. Any function of the same signature can take its place (`BiMask(search=...)`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_CHUNK = 1 << 22  # numbers in flight while swaps are weighed


class OrderSearch(Protocol):
    """What `BiMask(search=...)` expects."""

    def __call__(self, importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
        """Return an order at least as good as ``order`` and as the identity.

        importance: ``[rows, columns]``, non-negative; order: int64 ``[rows]``, ``rows`` a multiple of ``m``.
        moves: budget in weighed swaps, so that a run is reproducible. Returns int64 ``[rows]``.
        """


def kept_importance(importance: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """Sum over groups of ``m`` consecutive rows (after ``order``) and over columns of the ``n`` largest entries."""
    groups: Tensor = importance[order].unflatten(0, (-1, m))
    return groups.topk(n, dim=1).values.sum(dtype=torch.float64)


def pair_swap_search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
    """Hill climb over swaps of two rows in two groups, from the better of ``order`` and the identity.

    In every round the groups are paired at random, all m x m swaps of each pair are weighed at once, and the best one is
    taken where it gains. Ends after ``moves`` weighed swaps, or earlier when as many rounds as there are groups bring
    nothing. Never worse than either start; deterministic for a seed. Shapes as in `OrderSearch`.
    """
    starts = (order, torch.arange(len(order), device=order.device))
    best = max(starts, key=lambda start: float(kept_importance(importance, start, n, m)))
    current, groups = best.clone(), len(order) // m
    generator = torch.Generator().manual_seed(seed)
    pairs, idle = groups // 2, 0
    for _ in range(-(-moves // max(1, pairs * m * m)) if pairs else 0):
        shuffled = torch.randperm(groups, generator=generator).to(order.device)
        left, right = shuffled[:pairs], shuffled[pairs : 2 * pairs]
        gain, first, second = _best_swaps(importance, current.view(groups, m), left, right, n)
        taken = gain > 1e-9
        ones, others = (left * m + first)[taken], (right * m + second)[taken]
        current[ones], current[others] = current[others], current[ones]
        idle = 0 if bool(taken.any()) else idle + 1
        if idle > groups:
            break
    # gains are sums in another order than the total: where rounding fooled them, the start is still at hand
    return max((best, current), key=lambda end: float(kept_importance(importance, end, n, m)))


def _best_swaps(importance: Tensor, rows: Tensor, left: Tensor, right: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair of groups the best swap: relative gain, slot in the left group, slot in the right group.

    rows: ``[groups, m]``, an order by groups; left, right: ``[pairs]``, disjoint groups. The identity behind it: a group
    in which slot s is refilled by x keeps ``rest_s + sum of max(x, t_s)``, with t_s the n-th largest of the others.
    """
    m = rows.shape[1]
    found = []
    step = max(1, _CHUNK // (m * m * importance.shape[1]))
    for one, other in zip(left.split(step), right.split(step), strict=True):
        first, second = importance[rows[one]], importance[rows[other]]  # [pairs, m, columns]
        (rest1, least1, kept1), (rest2, least2, kept2) = _without_each(first, n), _without_each(second, n)
        into_first = torch.maximum(least1.unsqueeze(2), second.unsqueeze(1)).sum(-1)  # [pairs, slot 1, slot 2]
        into_second = torch.maximum(least2.unsqueeze(1), first.unsqueeze(2)).sum(-1)
        after = rest1.unsqueeze(2) + rest2.unsqueeze(1) + into_first + into_second
        before = (kept1 + kept2).view(-1, 1)
        gain, place = ((after.flatten(1) - before) / before.clamp(min=1e-30)).max(1)
        found.append((gain, place // m, place % m))
    gains, slots1, slots2 = zip(*found, strict=True)
    return torch.cat(gains), torch.cat(slots1), torch.cat(slots2)


def _without_each(group: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of a group without slot s: ``rest [pairs, m]``, ``t [pairs, m, columns]``; and ``kept [pairs]`` now.

    group: ``[pairs, m, columns]``. If s is among the n largest, the (n+1)-th moves up to be the n-th of the others.
    """
    top = group.topk(n + 1, dim=1).values
    total, nth, next_one = top[:, :n].sum(1, keepdim=True), top[:, n - 1 : n], top[:, n : n + 1]
    inside = group >= nth
    rest = total - torch.where(inside, group, nth)
    return rest.sum(-1), torch.where(inside, next_one, nth), total.sum((1, 2))
