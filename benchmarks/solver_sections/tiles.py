"""Transposable masks: seconds, and what is lost beside the optimum that linear programming finds on a sample of tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from baselines.matrices import KINDS
from baselines.transposable import by_enumeration, lean_approximation, optimum, tiles, two_approximation
from harness import table
from torch import Tensor

from nm_compiler.pattern import Pattern
from nm_compiler.solvers.transposable import transposable_mask
from solver_sections.common import Run, fastest, middle, verdict

CASES = (("2:4", 2048, 20.0, True), ("2:4", 2048, None, False), ("4:8", 1024, 3.0, False), ("8:16", 1024, 6.0, False),
         ("16:32", 1024, 12.0, False))  # fmt: skip
"""With what has to be reached, and whether exactly N in every row and column is asked for, as enumeration does."""
SAMPLE = 20  # tiles solved by linear programming


def patterns(run: Run) -> list[dict[str, Any]]:
    """Ours beside enumeration (2:4) and the 2-approximation."""
    rows, found = [], []
    repeats = 1 if run.quick else 3
    for text, size, reach, exactly in CASES:
        nm, worst = Pattern.parse(text), 0.0
        took: dict[str, list[float]] = {"ours": [], "others": [], "lean": []}
        losses = []
        for seed in run.seeds:
            importance = torch.from_numpy(KINDS["gauss"](size, size, seed))
            work = _others(importance, nm) | {"ours": partial(transposable_mask, importance, pattern=nm, exactly=exactly)}
            for name, each in work.items():
                took[name].append(fastest(each, repeats))
            mask = work["ours"]()
            kept, theirs = (float((importance * each).sum(dtype=torch.float64)) for each in (mask, work["others"]()))
            losses.append(100 * (1 - theirs / kept))
            worst = max(worst, 0.0 if exactly else _gap(importance, mask, nm))
        faster, than_lean = (
            [slow / mine for slow, mine in zip(took[name], took["ours"], strict=False)] for name in ("others", "lean")
        )
        name = "enumeration" if text == "2:4" else "2-approximation"
        rows.append([f"{text} {size}x{size}{', exactly N' if exactly else ''}", name, f"{1000 * median(took['others']):.0f}",
                     f"{1000 * median(took['ours']):.1f}", f"{median(losses):.2f}", f"{100 * worst:.0e}",
                     f"{median(faster):.1f}x", verdict(median(faster), reach),
                     f"{median(than_lean):.1f}x" if than_lean else ""])  # fmt: skip
        found.append({"pattern": text, "size": size, "exactly": exactly, "beside": name,
                      "seconds": {k: middle(v) for k, v in took.items() if v},
                      "times_faster": middle(faster), "they_lose_percent": middle(losses), "we_lose_beside_lp": worst,
                      "reach": reach})  # fmt: skip
    head = [
        "transposable, gauss",
        "beside",
        "theirs ms",
        "ours ms",
        "they lose %",
        "we lose % (LP)",
        "faster",
        "to reach",
        "than lean",
    ]
    print(table(head, rows), end="\n\n", flush=True)
    return found


def _others(importance: Tensor, nm: Pattern) -> dict[str, Callable[[], Tensor]]:
    if (nm.n, nm.m) == (2, 4):
        return {"others": partial(by_enumeration, importance)}
    both = {"others": two_approximation, "lean": lean_approximation}
    return {name: partial(way, importance, nm.n, nm.m) for name, way in both.items()}


def _gap(importance: Tensor, mask: Tensor, nm: Pattern) -> float:
    """The largest relative distance to the optimum among the first tiles."""
    parts, kept = (tiles(each, nm.m).flatten(0, 1)[:SAMPLE].double() for each in (importance, mask))
    return max(
        1 - float((tile * chosen).sum()) / optimum(tile.numpy(), nm.n) for tile, chosen in zip(parts, kept, strict=True)
    )
