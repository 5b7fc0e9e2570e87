"""Bi-Mask's backward order: which output rows share a backward group.

A simple pair-swap hill climb. Any function of the same signature can take its place (`BiMask(search=...)`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class OrderSearch(Protocol):
    """What `BiMask(search=...)` expects."""

    def __call__(self, importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
        """Return an order at least as good as ``order`` and as the identity.

        importance: ``[rows, columns]``, non-negative; order: int64 ``[rows]``, ``rows`` a multiple of ``m``.
        moves: budget in proposed swaps, so that a run is reproducible. Returns int64 ``[rows]``.
        """


def kept_importance(importance: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """Sum over groups of ``m`` consecutive rows (after ``order``) and over columns of the ``n`` largest entries."""
    return _kept(importance[order].unflatten(0, (-1, m)), n).sum()


def _kept(groups: Tensor, n: int) -> Tensor:
    """groups: ``[G, m, columns]``. Returns float64 ``[G]``: the importance that the best ``n`` of ``m`` keep."""
    return groups.topk(n, dim=1).values.sum((1, 2), dtype=torch.float64)


def pair_swap_search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
    """Hill climb over swaps of two rows in two groups, from the better of ``order`` and the identity.

    In every round the groups are paired at random and each pair tries one swap; the ones that gain are taken,
    so the result is never worse than either start. Deterministic for a seed. Shapes as in `OrderSearch`.
    """
    rows = len(order)
    identity = torch.arange(rows, device=order.device)
    starts = (order, identity)
    current = max(starts, key=lambda start: float(kept_importance(importance, start, n, m))).clone()
    groups = rows // m
    if groups < 2:
        return current
    generator = torch.Generator().manual_seed(seed)
    kept = _kept(importance[current].unflatten(0, (-1, m)), n)
    pairs = groups // 2
    for _ in range(max(1, moves // pairs)):
        shuffled = torch.randperm(groups, generator=generator)
        slots = torch.randint(m, (2, pairs), generator=generator)
        left, right = (shuffled[:pairs].to(order.device), shuffled[pairs : 2 * pairs].to(order.device))
        first, second = (left * m + slots[0].to(order.device), right * m + slots[1].to(order.device))
        proposal = current.clone()
        proposal[first], proposal[second] = current[second], current[first]
        both = torch.cat([left, right])
        new = _kept(importance[proposal.unflatten(0, (-1, m))[both]], n)
        gain = new[:pairs] + new[pairs:] - kept[left] - kept[right]
        accepted = gain > 1e-9 * kept[left]
        current = torch.where(_spread(accepted, left, right, groups, m), proposal, current)
        kept = kept.index_copy(0, both, torch.where(accepted.repeat(2), new, kept[both]))
    return current


def _spread(accepted: Tensor, left: Tensor, right: Tensor, groups: int, m: int) -> Tensor:
    """One flag a pair to one flag a row. Returns bool ``[groups * m]``."""
    flags = torch.zeros(groups, dtype=torch.bool, device=accepted.device)
    flags[left], flags[right] = accepted, accepted
    return flags.repeat_interleave(m)
