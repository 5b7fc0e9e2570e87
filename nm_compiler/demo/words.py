"""What a run of the demo found, in sentences that hold for its number of seeds, methods and patterns."""

from __future__ import annotations

from nm_compiler.demo.results import Outcome, Row
from nm_compiler.demo.settings import TITLES

_NUMBERS = ("no", "one", "two", "three", "four", "five")


def title(outcome: Outcome) -> str:
    """``N:M sparsity, five ways to train one network``."""
    count = 1 + len(set(outcome.settings.methods))  # dense training too
    return f"N:M sparsity, {_NUMBERS[count]} ways to train one network"


def found(outcome: Outcome) -> str:
    """What dense training reached, what each pattern cost, and how much of that may be chance."""
    dense, *others = outcome.rows()
    said = [f"Dense training reached {dense.accuracy:.2%}."]
    for pattern in outcome.settings.patterns:
        rows = sorted((row for row in others if row.entry.pattern == pattern), key=lambda row: -row.accuracy)
        best, worst = _gap(rows[0], dense), _gap(rows[-1], dense)
        ends = f", with {TITLES[rows[0].entry.method]}, and {worst} with {TITLES[rows[-1].entry.method]}"
        said.append(f"At {pattern} the difference was {best}{ends if len(rows) > 1 else ''} (points of test accuracy).")
    return " ".join([*said, _doubt(outcome)])


def spread(outcome: Outcome) -> str:
    """What the table's accuracies are of: one seed, or a mean of several."""
    return ": mean ± standard deviation over the seeds" if outcome.settings.seeds > 1 else ", of one seed"


def _doubt(outcome: Outcome) -> str:
    if outcome.settings.seeds == 1:
        return "It was one seed, and another would put the methods in another order: give --seeds 3 to compare them."
    most = max(row.deviation for row in outcome.rows())
    return f"Seeds differ by up to ± {100 * most:.2f} points: a smaller difference says nothing about the methods."


def _gap(row: Row, dense: Row) -> str:
    return f"{100 * (row.accuracy - dense.accuracy):+.2f}"
