"""Which models train through ``nm.compile(model)``, whose graphs TorchDynamo hands over; each in a process of its own.

    python benchmarks/live_coverage.py                  # torchvision and transformers, an hour on one core
    python benchmarks/live_coverage.py --library transformers --only 'b*' --resume
    python benchmarks/live_coverage.py --method BiMask --then eager

See README.md for what is checked and what the columns mean.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from harness import arguments, environment, table, write
from live_reach import train
from torch import nn
from workers import Row, each
from zoo import LIBRARIES, entries

import nm_compiler as nm

HEAD = [
    "model",
    "trains",
    "planned",
    "refused",
    "unread",
    "fragments",
    "breaks",
    "differs",
    "first step s",
    "step s",
    "peak MiB",
]


def cells(row: Row) -> list[str]:
    """A row of the table; a blank where the model did not get that far."""

    def shown(key: str, form: str = "") -> str:
        return format(row[key], form) if key in row else ""

    return [
        f"{row['library']}/{row['model']}", "no" if row.get("error") else "yes", shown("planned"),
        str(sum(row["reasons"].values())) if "reasons" in row else "", str(len(row["unread"])) if "unread" in row else "",
        shown("fragments"), str(sum(row["breaks"].values())) if "breaks" in row else "", shown("difference", ".0e"),
        shown("first_seconds", ".1f"), shown("step_seconds", ".2f"), shown("peak_mib", ".0f"),
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """A line for each library, and the names that fail."""
    lines = []
    for library in LIBRARIES:
        mine = [row for row in rows if row["library"] == library]
        failed = [row["model"] for row in mine if row.get("error")]
        one = sum(row.get("fragments") == 1 for row in mine)
        planned = sum(row.get("planned", 0) for row in mine)
        if mine:
            lines.append([library, str(len(mine)), str(len(mine) - len(failed)), str(one), str(planned), ", ".join(failed)])
    return table(["library", "models", "train", "in one fragment", "weights planned", "fail"], lines)


def warm_up(then: str) -> None:
    """Import once, before the first fork, what every model needs."""
    with torch.random.fork_rng(devices=[]):
        nm.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), then=then)(
            torch.randn(2, 8)
        ).sum().backward()
    torch._dynamo.reset()


def main(words: Sequence[str] | None = None) -> None:
    """Train, print, write after every model."""
    parser = arguments("Which models train through nm.compile(model)", Path(__file__).stem)
    parser.add_argument("--only", default="*", help="a glob over names")
    parser.add_argument("--library", choices=LIBRARIES, help="one library; by default torchvision and transformers")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON has, and measure the others")
    parser.add_argument("--again", action="store_true", help="with --resume: measure those that failed again")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one model")
    parser.add_argument("--method", default="LBC", choices=["LBC", "BiMask"])
    parser.add_argument("--then", default="aot_eager", choices=["inductor", "aot_eager", "eager"])
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    libraries = (given.library,) if given.library else ("torchvision", "transformers")
    started = environment(given.threads) | {library: version(library) for library in libraries}
    rows: dict[str, Row] = {}
    if given.resume and given.out.exists():
        kept = json.loads(given.out.read_text())["models"]
        rows = {f"{row['library']}/{row['model']}": row for row in kept if not (given.again and row.get("error"))}
    listed = [entry for library in libraries for entry in entries(library)]
    chosen = [entry for entry in listed if fnmatch.fnmatch(entry.name, given.only) and str(entry) not in rows]
    warm_up(given.then)
    work = partial(train, method=given.method, then=given.then)
    said = {"method": given.method, "then": given.then, "commit": started["commit"]}
    for entry, found in each(work, chosen, jobs=1, timeout=given.timeout):
        rows[str(entry)] = {"library": entry.library, "model": entry.name, **said, **found}
        print("  ".join(cells(rows[str(entry)])), rows[str(entry)].get("error", "").replace("\n", " ")[:300], flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"environment": started, "models": list(rows.values())}, indent=1) + "\n")
    ordered = sorted(rows.values(), key=lambda row: (list(LIBRARIES).index(row["library"]), row["model"]))
    reasons = sum((Counter(row.get("reasons", {})) for row in ordered), Counter[str]())
    print(f"\n{table(HEAD, [cells(row) for row in ordered])}\n\n{summary(ordered)}\n")
    print("\n".join(f"{count:6}  {reason}" for reason, count in reasons.most_common()))
    write(given.out, started, {"models": ordered})


if __name__ == "__main__":
    main(sys.argv[1:])
