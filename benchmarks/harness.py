"""What every benchmark shares: interleaved timing, medians, tables, and a JSON file that says where it was measured.

Variants are timed in turn, round by round, so that a busy minute of a shared machine falls on all of them; ratios are
taken inside a round and then the median over the rounds is reported. On a machine that others use, ``--threads 1
--clock cpu`` is the steadiest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import nm_compiler

RESULTS = Path(__file__).resolve().parent / "results"

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu is the time this process computed, whoever else was busy: fair with one thread (more threads spin while waiting)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one quantity, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half lies between these two."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = quantiles(self.values, n=4, method="inclusive")
        return low, high

    def over(self, base: Spread) -> Spread:
        """Ratios, measurement by measurement: both were taken in the same rounds."""
        return Spread(tuple(mine / theirs for mine, theirs in zip(self.values, base.values, strict=True)))

    def as_json(self) -> dict[str, Any]:
        """Summary and raw values."""
        low, high = self.quartiles
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "quartiles": [low, high],
            "repeats": len(self.values),
            "values": list(self.values),
        }


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """The time of one call."""
    start = clock()
    work()
    return clock() - start


def interleaved(
    work: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int, clock: Clock = time.perf_counter
) -> dict[str, Spread]:
    """Time every entry once a round, ``repeats`` rounds after ``warmup`` unmeasured ones, in seconds.

    The order rotates from round to round, so that nobody always runs after the same neighbour; the garbage collector
    runs between measurements, not inside.
    """
    names = list(work)
    taken: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + repeats):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                spent = seconds(work[name], clock)
                if number >= warmup:
                    taken[name].append(spent)
                gc.collect()
    finally:
        gc.enable()
    return {name: Spread(tuple(values)) for name, values in taken.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [_line(row, widths) for row in (head, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = row
    return "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])


def against(value: float, bound: float | None) -> str:
    """The bound, and whether the value keeps it."""
    return "" if bound is None else f"{bound:.2f} {'met' if value <= bound else 'MISSED'}"


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks understand."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it runs, not to quote")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the JSON goes")
    return parser


def environment(threads: int) -> dict[str, Any]:
    """Hardware, versions, commit, date and load."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nm_compiler": nm_compiler.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": [line[3:] for line in _git("status", "--porcelain").splitlines()],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
    }


def write(path: Path, started: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    """The result with its environment; ``started`` was taken before the measurements, the load after is added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**started, "load_average_after": os.getloadavg()}
    path.write_text(json.dumps({"environment": environment, **body}, indent=1) + "\n")
    print(f"\n{started['cpu']}, {started['threads']} of {started['cores']} cores, torch {started['torch']}, "
          f"load {started['load_average'][0]:.1f} before and {os.getloadavg()[0]:.1f} after -> {path}")  # fmt: skip


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.rstrip()
