"""Orders of one matrix: efficacy (share of the gap to the row-wise best N/M that an order closes), ours and others'."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from baselines.matrices import KINDS, Array
from baselines.orders import assignment, hill_climb, stripe_groups
from harness import table

from nm_compiler.pattern import Pattern
from nm_compiler.solvers.search import search_order, snake
from nm_compiler.solvers.search_members import efficacy
from solver_sections.common import Run, middle, timed, verdict


@dataclass(frozen=True)
class Case:
    """A matrix, our budget, and the points of efficacy by which the baseline has to be exceeded."""

    rows: int
    channels: int
    kind: str
    budget_s: float
    reach: float | None
    others: tuple[str, ...] = ("hill climb", "stripe groups")
    base: str = "hill climb"


CASES = (
    Case(64, 64, "gauss", 1, 7.5),
    Case(64, 64, "trained", 1, 5),
    Case(256, 256, "gauss", 2, 4),
    Case(256, 256, "trained", 2, 2.5),
    Case(256, 256, "neigh", 2, None),
    Case(768, 768, "gauss", 4, 2.5, ("hill climb",)),
    Case(768, 768, "trained", 4, 2.2, ("hill climb",)),
    Case(4096, 4096, "trained", 8, 8, (), "snake"),
)
PATTERNS = ("1:4", "4:8", "2:8", "1:16")


def _ways(n: int, m: int) -> dict[str, Callable[[Array], Array]]:
    return {
        "snake": lambda matrix: snake(np.ascontiguousarray(matrix.T), m),
        "hill climb": partial(hill_climb, n=n, m=m),
        "stripe groups": partial(stripe_groups, n=n, m=m),
    }


def points(matrix: Array, order: Array, pattern: str) -> float:
    """Efficacy in percent."""
    return 100 * efficacy(matrix, order, pattern=pattern)


def sizes(run: Run) -> list[dict[str, Any]]:
    """2:4 on matrices of all sizes, beside what apex does."""
    ways, rows, found = _ways(2, 4), [], []
    warm = KINDS["gauss"](16, 16, 0)
    for way in ways.values():
        way(warm)
    search_order(warm, pattern="2:4", moves=1000)
    for case in CASES[:4] if run.quick else CASES:
        names = ("snake", *case.others)
        got: dict[str, list[float]] = {name: [] for name in ("ours", *names)}
        took: dict[str, list[float]] = {name: [] for name in ("ours", *names)}
        for seed in run.seeds:
            matrix = KINDS[case.kind](case.rows, case.channels, seed)
            work = {name: ways[name] for name in names}
            work["ours"] = partial(search_order, pattern="2:4", budget_s=case.budget_s)
            for name, each in work.items():
                order, spent = timed(each, matrix)
                got[name].append(points(matrix, order, "2:4"))
                took[name].append(spent)
        ahead = [ours - base for ours, base in zip(got["ours"], got[case.base], strict=True)]
        rows.append(
            [f"{case.rows}x{case.channels} {case.kind}"]
            + [_cell(got, took, name) for name in ("snake", "hill climb", "stripe groups", "ours")]
            + [f"{median(ahead):+.1f}", verdict(median(ahead), case.reach)]
        )
        found.append({
            "rows": case.rows, "channels": case.channels, "kind": case.kind, "base": case.base, "reach": case.reach,
            "efficacy": {k: middle(v) for k, v in got.items()}, "seconds": {k: middle(v) for k, v in took.items()},
            "ahead": middle(ahead),
        })  # fmt: skip
    head = ["2:4, efficacy % (s)", "snake", "hill climb", "stripe groups", "ours", "ahead", "to reach"]
    print(table(head, rows), end="\n\n", flush=True)
    return found


def _cell(got: dict[str, list[float]], took: dict[str, list[float]], name: str) -> str:
    return f"{median(got[name]):.1f} ({median(took[name]):.2g})" if name in got else ""


def patterns(run: Run) -> list[dict[str, Any]]:
    """Other N:M, beside linear assignment given the same time."""
    rows, found = [], []
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        for kind in ("gauss", "trained"):
            got: dict[str, list[float]] = {"snake": [], "assignment": [], "ours": []}
            for seed in run.seeds:
                matrix = KINDS[kind](256, 256, seed)
                got["snake"].append(points(matrix, snake(np.ascontiguousarray(matrix.T), pattern.m), text))
                got["assignment"].append(points(matrix, assignment(matrix, pattern.n, pattern.m, 2.0), text))
                got["ours"].append(points(matrix, search_order(matrix, pattern=text, budget_s=2.0), text))
            ahead = [ours - base for ours, base in zip(got["ours"], got["assignment"], strict=True)]
            cells = [f"{median(values):.1f}" for values in got.values()]
            rows.append([f"{text} {kind}", *cells, f"{median(ahead):+.1f}", verdict(median(ahead), 0)])
            found.append(
                {"pattern": text, "kind": kind, "efficacy": {k: middle(v) for k, v in got.items()}, "ahead": middle(ahead)}
            )
    head = ["256x256, 2 s, efficacy %", "snake", "assignment", "ours", "ahead", "to reach"]
    print(table(head, rows), end="\n\n", flush=True)
    return found


def widest() -> dict[str, Any]:
    """16,384 channels: the memory that the search takes, in a process of its own."""
    code = (
        "import numpy as np, resource, sys\n"
        "from nm_compiler.solvers.search import search, search_order\n"
        "matrix = np.abs(np.random.default_rng(0).standard_normal((4096, 16384), dtype=np.float32))\n"
        "search_order(matrix[:8, :16].copy(), pattern='2:4', moves=100)\n"
        "found = search(matrix, pattern='2:4', budget_s=8)\n"
        "print(found.gain, found.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gain, spent, peak = map(float, done.stdout.split())
    print(f"16384 channels x 4096 rows, gauss: {100 * gain:.2f} % more kept in {spent:.1f} s, whole process at most "
          f"{peak:.2f} GiB ({'met' if peak <= 4 else 'MISSED'}: 4)\n", flush=True)  # fmt: skip
    return {"gain": gain, "seconds": spent, "peak_gib": peak}
