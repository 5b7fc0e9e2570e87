"""Which models can be compiled at all: one row for each model of the zoo, each in a process of its own.

    python benchmarks/coverage.py                                  # everything, hours on one core
    python benchmarks/coverage.py --library timm --only 's*' --resume
    python benchmarks/coverage.py --quick --capture-only           # small variants, only whether they can be captured

See README.md for what the columns mean.
"""

from __future__ import annotations

if __name__ == "coverage":  # what numba looks for under this name is another package
    raise ImportError("benchmarks/coverage.py is a script")

import fnmatch
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import arguments, environment, table, write
from reach import measure
from torch import nn
from workers import Row, each
from zoo import LIBRARIES, Entry, entries

from nm_compiler.law import permutation_law

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from awkward import AWKWARD

ALL = (*LIBRARIES, "awkward")


def listed(library: str | None) -> list[Entry]:
    """The zoo and the tests' awkward models."""
    awkward = [Entry("awkward", name, build, build) for name, build in AWKWARD.items()]
    wanted = ALL if library is None else (library,)
    return [entry for name in wanted for entry in (awkward if name == "awkward" else entries(name))]


HEAD = [
    "model", "weights", "eval", "train", "way", "differs", "planned", "refused", "free inputs", "law error", "unnoticed",
    "capture s", "axes s", "compile s", "peak MiB",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the table; a blank where the model did not get that far."""

    def shown(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    return [
        f"{row['library']}/{row['model']}", shown("parameters", ","), row.get("eval", "no"), row.get("train", "no"),
        row.get("way", ""), shown("difference", ".0e") if row.get("difference") else "", shown("planned", "d"),
        str(sum(row["reasons"].values())) if "reasons" in row else "",
        f"{row['free_input_axes']}/{row['input_axes']}" if "input_axes" in row else "",
        shown("law_error", ".0e") + (" f32" if row.get("law_dtype") == "float32" else ""),
        f"{len(row['undetected'])}/{row['undone']}" if "undone" in row else "", shown("capture_seconds", ".1f"),
        shown("axes_seconds", ".2f"), shown("compile_seconds", ".1f"), shown("peak_mib", ".0f"),
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """A line for each library."""
    kinds = [(library, [row for row in rows if row["library"] == library]) for library in ALL]
    lines = [[library, *_totals(mine)] for library, mine in kinds if mine]
    head = [
        "library", "models", "eval", "train", "second way", "with N:M weights", "equal to the bit", "free inputs",
        "law checked", "law broken", "axes / capture, most", "capture s, median", "compile s, most",
    ]  # fmt: skip
    return table(head, lines)


def _totals(rows: Sequence[Row]) -> list[str]:
    def count(true: Callable[[Row], bool]) -> str:
        return str(sum(map(true, rows)))

    free, every = (sum(row.get(key, 0) for row in rows) for key in ("free_input_axes", "input_axes"))
    share = max((row["axes_seconds"] / row["capture_seconds"] for row in rows if "axes_seconds" in row), default=0)
    took = [row["capture_seconds"] for row in rows if "capture_seconds" in row]
    return [
        str(len(rows)), count(lambda row: row.get("eval") == "yes"), count(lambda row: row.get("train") == "yes"),
        count(lambda row: row.get("way") == "fragments"), count(lambda row: row.get("planned", 0) > 0),
        count(lambda row: row.get("difference", 1) == 0), f"{free}/{every}", count(lambda row: "law_error" in row),
        count(lambda row: row.get("law_holds") is False), f"{share:.0%}", f"{median(took):.1f}" if took else "",
        f"{max((row.get('compile_seconds', 0) for row in rows), default=0):.1f}",
    ]  # fmt: skip


def warm_up() -> None:
    """Import once, before the first fork, what every capture needs."""
    with torch.random.fork_rng(devices=[]):
        permutation_law(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (torch.randn(2, 8),), undo=1)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write after every model."""
    parser = arguments("Which models can be compiled", Path(__file__).stem)
    parser.add_argument("--only", default="*", help="a glob over names")
    parser.add_argument("--library", choices=ALL, help="one library instead of all")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON has, and measure the others")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one model")
    parser.add_argument("--capture-only", action="store_true", help="neither axes nor nm.compile")
    parser.add_argument("--undo", type=int, default=12, help="axes of each model to undo one at a time")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    started = environment(given.threads) | {library: version(library) for library in LIBRARIES}
    chosen = [entry for entry in listed(given.library) if fnmatch.fnmatch(entry.name, given.only)]
    rows: dict[str, Row] = {}
    if given.resume and given.out.exists():
        rows = {f"{row['library']}/{row['model']}": row for row in json.loads(given.out.read_text())["models"]}
    chosen = [entry for entry in chosen if str(entry) not in rows]
    work = partial(measure, quick=given.quick, capture_only=given.capture_only, undo=given.undo)
    warm_up()
    for entry, found in each(work, chosen, jobs=given.jobs, timeout=given.timeout):
        row = {"library": entry.library, "model": entry.name, **found, "commit": started["commit"]}
        rows[str(entry)] = row  # those that --resume keeps may be of another commit
        print("  ".join(cells(row)), row.get("error", "").replace("\n", " ")[:200], flush=True)
        _keep(given.out, started, rows)
    ordered = sorted(rows.values(), key=lambda row: (ALL.index(row["library"]), row["model"]))
    print(f"\n{table(HEAD, [cells(row) for row in ordered])}\n\n{summary(ordered)}")
    write(given.out, started, {"models": ordered})


def _keep(path: Path, started: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """The result so far: an interrupted run goes on with --resume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": started, "models": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
