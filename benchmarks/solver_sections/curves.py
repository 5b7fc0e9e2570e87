"""Quality over time: what a search has reached after how long, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from baselines.matrices import KINDS, Array
from baselines.orders import assignment, hill_climb, stripe_groups

from nm_compiler.solvers.search import search, snake
from nm_compiler.solvers.search_budget import Progress
from nm_compiler.solvers.search_members import efficacy, retained
from solver_sections.common import Run, timed

CASES = (("gauss", 64), ("trained", 256), ("trained", 768))
SECONDS = 5.0


def draw(run: Run, path: Path) -> list[dict[str, Any]]:
    """One panel a matrix; ours as a curve, others as the points where they end."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nm_compiler"
    from matplotlib import pyplot

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
        panel.plot(*zip(*curve, strict=True), color="tab:blue", label="search_order")
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


def _curve(matrix: Array, budget_s: float) -> list[tuple[float, float]]:
    """(seconds, efficacy in percent) from the first look to the end."""
    heard: list[Progress] = []
    result = search(matrix, pattern="2:4", budget_s=budget_s, progress=heard.append)
    start = retained(matrix, pattern="2:4")
    end = retained(matrix, result.order, pattern="2:4")
    gap = 100 * efficacy(matrix, result.order, pattern="2:4") / (end - start)  # percent for a unit kept more
    first = end / (1 + heard[-1].gained)  # what the search began with: the better of identity and snake
    return [(now.seconds, gap * (first * (1 + now.gained) - start)) for now in heard]
