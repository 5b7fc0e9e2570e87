"""What a run of the demo found: one `Run` for each contestant and seed, and the table over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nm_compiler.demo.settings import DENSE, Entry, Settings
from nm_compiler.runtime.report import Report

WARM_UP = 3  # the first steps after a start or a switch also pay for allocations and kernel choices


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """Bi-Mask's backward mask in one weight: the share of sum |W * F| that B keeps, under different channel orders.

    start: fresh weights in their own order; identity, chance, searched: the trained weights, in their own order, in
    random orders on average, and in the order that was found.
    """

    name: str
    start: float
    identity: float
    chance: float
    searched: float


@dataclass(slots=True)
class Run:
    """One contestant, one seed. Accuracies are shares of the test images; seconds has one entry a training step.

    curve and live: (share of training done, value); seconds: forward, backward and optimizer; upkeep: of all steps of the
    sparsity scheduler together; begun: the step from which the run was sparse; exact: weights that `nm.verify` found
    N:M, of how many planned.
    """

    entry: Entry
    seed: int
    accuracy: float = 0.0
    retained: float = 1.0
    exact: tuple[int, int] = (0, 0)
    curve: list[tuple[float, float]] = field(default_factory=list)
    live: list[tuple[float, float]] = field(default_factory=list)
    orders: list[LayerOrder] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    upkeep: float = 0.0
    begun: int = 0
    report: Report | None = None
    sample: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, over the seeds. step: time of an optimizer step, 1 for dense, ``upkeep`` of it for the masks."""

    entry: Entry
    accuracy: float
    deviation: float
    retained: float
    exact: tuple[int, int]
    step: float
    upkeep: float
    seeds: int

    @property
    def cells(self) -> list[str]:
        """The row as text, a cell a column."""
        name, pattern = str(self.entry).removesuffix(f" {self.entry.pattern}"), str(self.entry.pattern or "-")
        accuracy = f"{self.accuracy:.2%}" + (f" ± {100 * self.deviation:.2f}" if self.seeds > 1 else "")
        if not self.entry.pattern:
            return [name, pattern, accuracy, "100.0%", "-", f"{self.step:.2f}x"]
        found, planned = self.exact
        exact = f"{'yes' if found == planned else 'NO'}, {found}/{planned} weights {pattern}"
        return [name, pattern, accuracy, f"{self.retained:.1%}", exact, f"{self.step:.2f}x"]


HEADINGS = ["method", "pattern", "test accuracy", "magnitude retained", "exact pattern verified", "step time"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """All runs of the demo, with what they ran on. ``print`` it for the table.

    sizes: training and test images; steps: of each contestant; examples: some test images, uint8; seconds: in all.
    """

    settings: Settings
    data: str
    sizes: tuple[int, int]
    steps: int
    runs: tuple[Run, ...]
    examples: Tensor
    seconds: float

    def of(self, entry: Entry) -> list[Run]:
        """The runs of a contestant, by seed."""
        return [run for run in self.runs if run.entry == entry]

    def rows(self) -> list[Row]:
        """The table, dense first."""
        return [_row(entry, self.of(entry), self.of(DENSE)) for entry in self.settings.entries]

    def describe(self) -> str:
        """One sentence: what was trained on what, and for how long."""
        train, test = self.sizes
        settings = self.settings
        seeds = f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
        return (
            f"{settings.model} net on {self.data}: {train:,} training and {test:,} test images, {self.steps:,} steps of "
            f"{min(settings.batch_size, train)} images for everyone, {seeds}, {settings.device}, {self.seconds:.0f} s in all"
        )

    def __str__(self) -> str:
        lines = [HEADINGS, *(row.cells for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        rule = "-" * max(map(len, text))
        blocks = [text[1:2]] + [
            [line for line, row in zip(text[1:], self.rows(), strict=True) if row.entry.pattern == pattern]
            for pattern in self.settings.patterns
        ]
        return "\n".join([self.describe(), "", text[0], rule, *_joined(blocks, rule), ""])


def _joined(blocks: Sequence[Sequence[str]], rule: str) -> list[str]:
    return [line for block in blocks for line in (*block, rule)]


def _row(entry: Entry, runs: Sequence[Run], dense: Sequence[Run]) -> Row:
    accuracies = [run.accuracy for run in runs]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    retained = statistics.fmean(run.retained for run in runs)
    worst = min((run.exact for run in runs), key=lambda exact: exact[0] - exact[1])
    pairs = list(zip(runs, dense, strict=True))
    upkeep = statistics.fmean(_upkeep(run, other) for run, other in pairs)
    step = upkeep + statistics.fmean(_median(run, run.begun) / _median(other, run.begun) for run, other in pairs)
    return Row(entry, statistics.fmean(accuracies), deviation, retained, worst, step, upkeep, len(runs))


def _median(run: Run, begun: int) -> float:
    """Seconds of the median step from ``begun`` on."""
    return statistics.median(run.seconds[min(begun + WARM_UP, len(run.seconds) - 1) :])


def _upkeep(run: Run, dense: Run) -> float:
    """What keeping the masks costs on average, in dense steps: rare, so a median would not see it."""
    return run.upkeep / max(1, len(run.seconds) - run.begun) / _median(dense, run.begun)
