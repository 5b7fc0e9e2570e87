"""Quality over time: what a budget of so many seconds buys, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from baselines.matrices import KINDS, Array
from baselines.orders import assignment, hill_climb, stripe_groups

from nm_compiler.solvers.search import search_order, snake
from nm_compiler.solvers.search_members import efficacy
from solver_sections.common import Run, timed

CASES = (("gauss", 64), ("trained", 256), ("trained", 768))
SECONDS = 5.0
BUDGETS_S = (0.005, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0)


def draw(run: Run, path: Path) -> list[dict[str, Any]]:
    """One panel a matrix; ours as a curve, others as the points where they end."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nm_compiler"
    from matplotlib import pyplot

    search_order(KINDS["gauss"](16, 16, 0), pattern="2:4", moves=100)  # the kernels are there
    figure, panels = pyplot.subplots(1, len(CASES), figsize=(12, 3.6), layout="constrained")
    found = []
    for panel, (kind, size) in zip(panels, CASES, strict=True):
        matrix = KINDS[kind](size, size, run.seeds[0])
        curve = _curve(matrix, 1.0 if run.quick else SECONDS)
        others = {
            name: timed(way, matrix)
            for name, way in {
                "snake": lambda m: snake(np.ascontiguousarray(m.T), 4),
                "hill climb": lambda m: hill_climb(m, 2, 4),
                "assignment": lambda m: assignment(m, 2, 4, SECONDS),
                "stripe groups": lambda m: stripe_groups(m, 2, 4),
            }.items()
            if not (run.quick and name == "stripe groups")
        }
        panel.plot(*zip(*curve, strict=True), "o-", color="tab:blue", label="search_order, by budget")
        marks: list[dict[str, Any]] = []
        for marker, (name, (order, spent)) in zip("vos^", others.items(), strict=False):
            value = 100 * efficacy(matrix, order, pattern="2:4")
            panel.plot([max(spent, 1e-3)], [value], marker, color="tab:gray", label=name)
            marks.append({"name": name, "seconds": spent, "efficacy": value})
        panel.set(xscale="log", xlabel="seconds, one thread", title=f"{size} x {size}, {kind}, 2:4")
        panel.grid(alpha=0.3)
        found.append({"kind": kind, "size": size, "curve": curve, "others": marks})
    panels[0].set_ylabel("efficacy, %")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"quality over time -> {path}\n", flush=True)
    return found


def _curve(matrix: Array, most_s: float) -> list[tuple[float, float]]:
    """(seconds taken, efficacy in percent) of a search with each budget: annealing makes use of what it is given."""
    budgets = [budget for budget in BUDGETS_S if budget <= most_s]
    found = [timed(search_order, matrix, pattern="2:4", budget_s=budget) for budget in budgets]
    return [(spent, 100 * efficacy(matrix, order, pattern="2:4")) for order, spent in found]
