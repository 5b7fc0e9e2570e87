"""Bi-Mask's backward order: share of the gap between a random order and the bound that is recovered; the paper's 100 draws."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

import torch
from baselines.backward import bound, kept, random_hundred
from baselines.matrices import KINDS
from harness import table
from torch import Tensor

from nm_compiler.solvers.backward_order import assignment_search, search_backward_order
from nm_compiler.solvers.magnitude import magnitude_mask
from solver_sections.common import Run, middle, timed, verdict

SIZES = ((64, 55.0), (256, 29.0), (768, 17.0))


def sizes(run: Run) -> list[dict[str, Any]]:
    """Count objective, 2:4 on gauss, in less time than the 100 draws take on the same weight."""
    rows, found = [], []
    warm = torch.randn(16, 16)
    search_backward_order(warm, pattern="2:4", objective="count", moves=100)
    for size, reach in SIZES:
        shares: dict[str, list[float]] = {"random-100": [], "ours": [], "in training": []}
        took: dict[str, list[float]] = {name: [] for name in shares}
        for seed in run.seeds:
            weight = torch.from_numpy(KINDS["gauss"](size, size, seed))
            mask = magnitude_mask(weight, 2, 4, 1)
            torch.manual_seed(seed)
            best, spent = timed(random_hundred, weight, 2, 4)
            base, top = mean(kept(mask, torch.randperm(size), 2, 4) for _ in range(20)), bound(mask, 2, 4)
            order, mine = timed(search_backward_order, weight, pattern="2:4", objective="count", budget_s=0.9 * spent)
            again, short = timed(assignment_search, mask.float(), torch.arange(size), 2, 4, moves=10 * size, seed=seed)
            for name, each, seconds in (
                ("random-100", best, spent),
                ("ours", torch.as_tensor(order), mine),
                ("in training", again, short),
            ):
                shares[name].append(100 * (kept(mask, each, 2, 4) - base) / (top - base))
                took[name].append(seconds)
        in_time = median(took["ours"]) < median(took["random-100"])
        rows.append(
            [f"{size}x{size} gauss"]
            + [f"{median(shares[name]):.1f} ({1000 * median(took[name]):.0f})" for name in shares]
            + [verdict(median(shares["ours"]), reach) + ("" if in_time else ", TOO SLOW")]
        )
        found.append({"size": size, "reach": reach, "recovered": {k: middle(v) for k, v in shares.items()},
                      "seconds": {k: middle(v) for k, v in took.items()}})  # fmt: skip
    print(table(["recovered % (ms)", *shares, "to reach"], rows), flush=True)
    if not run.quick:
        found.append(_large(run.seeds[0]))
    print()
    return found


def _large(seed: int) -> dict[str, Any]:
    """In two seconds, of which a third goes into the forward mask and the matrix that is searched."""
    weight = torch.from_numpy(KINDS["trained"](4096, 4096, seed))
    mask = magnitude_mask(weight, 2, 4, 1)
    total = float(mask.sum())
    order, spent = timed(search_backward_order, weight, pattern="2:4", objective="count", budget_s=1.6)
    identity, mine = (kept(mask, each, 2, 4) / total for each in (torch.arange(4096), torch.as_tensor(order)))
    generator = torch.Generator().manual_seed(seed)
    draws, slow = timed(_draws, mask, 10, generator)
    print(f"4096x4096 trained, share kept: identity {identity:.4f}, best of 10 random "
          f"{max(draws) / total:.4f} ({slow:.1f} s), ours {mine:.4f} in {spent:.1f} s, "
          f"bound {bound(mask, 2, 4) / total:.4f}; to reach {verdict(mine, 0.764)}")  # fmt: skip
    return {
        "size": 4096,
        "kept": mine,
        "seconds": spent,
        "identity": identity,
        "random_10": max(draws) / total,
        "random_10_seconds": slow,
    }


def _draws(mask: Tensor, count: int, generator: torch.Generator) -> list[float]:
    """What random orders keep."""
    return [kept(mask, torch.randperm(len(mask), generator=generator), 2, 4) for _ in range(count)]
