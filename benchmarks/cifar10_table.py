"""The table and the curves of what `cifar10.py` or `characters.py` found: mean over the seeds, plus and minus one standard
deviation.

python benchmarks/cifar10_table.py                      # Markdown on stdout, curves beside the JSON files
python benchmarks/cifar10_table.py --results benchmarks/results/characters --no-plot
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TITLES = {
    "dense": "dense", "magnitude": "Magnitude (ASP)", "transposable": "Transposable", "gradual": "Gradual", "srste": "SR-STE",
    "sste": "S-STE", "lbc": "LBC", "bimask": "Bi-Mask", "bimask_random": "Bi-Mask, best of 10 random orders",
    "bimask_identity": "Bi-Mask, no order", "lbc_bimask": "LBC forward, Bi-Mask backward",
}  # fmt: skip
Run = dict[str, Any]
Runs = Mapping[tuple[str, str, str], Sequence[Run]]
"""By (model, pattern, method)."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a table shows of its runs. key: in their JSON; factor, digits: as it is printed; length: how long they were."""

    key: str
    factor: float
    digits: int
    title: str
    unit: str
    length: str


ACCURACY = Measure("accuracy", 100, 2, "test accuracy, %", "epochs", "{epochs} epochs of {train} images, batch {batch}")
BITS = Measure("bits", 1, 3, "bits per character, lower is better", "steps", "{steps} steps of {batch} x {context} characters")


def measure_of(runs: Iterable[Run]) -> Measure:
    """Accuracies of images, bits of characters."""
    return BITS if all(BITS.key in run for run in runs) else ACCURACY


def main() -> None:
    """Print the tables, one a model, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results" / "cifar10")
    parser.add_argument("--no-plot", action="store_true", help="no picture: matplotlib is not needed")
    options = parser.parse_args()
    runs = load(options.results)
    if not runs:
        raise SystemExit(f"no runs in {options.results}: python benchmarks/cifar10.py --out {options.results} makes them")
    for model in sorted({model for model, _, _ in runs}):
        print(table(runs, model) + "\n")
        if not options.no_plot:
            plot(runs, model, options.results / f"{model}.svg")


def load(folder: Path) -> Runs:
    """All finished runs of a folder."""
    found = defaultdict(list)
    for file in sorted(folder.glob("*-seed*.json")):
        run = json.loads(file.read_text())
        found[run["cell"]["model"], run["cell"]["pattern"], run["cell"]["method"]].append(run)
    return dict(found)


def table(runs: Runs, model: str) -> str:
    """Markdown: a row a method, a column a pattern; after the value its difference to dense, in points or in bits."""
    patterns = sorted({pattern for name, pattern, _ in runs if name == model and pattern}, key=_sparsity)
    methods = [method for method in TITLES if any((model, pattern, method) in runs for pattern in ("", *patterns))]
    mine = [run for key, group in runs.items() if key[0] == model for run in group]
    measure = measure_of(mine)
    lines = [
        f"**{model}**, {measure.title}: {_length(measure, mine)}, {_few(run['recipe']['precision'] for run in mine)}, "
        f"seeds: {_few(len(group) for key, group in runs.items() if key[0] == model)}, {_few(run['device'] for run in mine)}",
        "",
        "| | " + " | ".join(patterns or ["dense"]) + " |",
        "|---" * (1 + len(patterns or [""])) + "|",
    ]
    dense = [run[measure.key] for run in runs.get((model, "", "dense"), ())]
    for method in methods:
        cells = []
        for pattern in patterns or [""]:
            group = [run[measure.key] for run in runs.get((model, "" if method == "dense" else pattern, method), ())]
            cells.append(_cell(measure, group, [] if method == "dense" else dense))
        lines.append(f"| {TITLES[method]} | " + " | ".join(cells) + " |")
    pruned = [run for key, group in runs.items() if key[0] == model and key[2] == "magnitude" for run in group]
    for pattern in patterns if pruned else ():
        group = [run["one_shot"] for run in pruned if run["cell"]["pattern"] == pattern]
        if group:
            lines += [
                "",
                f"Magnitude right after pruning to {pattern}, before it is trained again: {_cell(measure, group, [])}.",
            ]
    wrong = [run["cell"] for run in mine if run["exact"][0] != run["exact"][1]]
    if wrong:
        lines += ["", f"NOT N:M after freezing: {wrong}"]
    return "\n".join(lines)


def _length(measure: Measure, runs: Sequence[Run]) -> str:
    found = {name: _few(run["recipe"].get(name) for run in runs) for name in ("epochs", "steps", "batch", "context")}
    return measure.length.format(**found, train=_few(run["train"] for run in runs))


def _cell(measure: Measure, group: Sequence[float], dense: Sequence[float]) -> str:
    if not group:
        return ""
    factor, digits = measure.factor, measure.digits
    mean = factor * statistics.fmean(group)
    spread = f" ± {factor * statistics.stdev(group):.{digits}f}" if len(group) > 1 else ""
    missing = f" ({mean - factor * statistics.fmean(dense):+.{digits}f})" if dense else ""
    return f"{mean:.{digits}f}{spread}{missing}"


def _few(values: Iterable[object]) -> str:
    return " or ".join(sorted({str(value) for value in values}))


def _sparsity(pattern: str) -> tuple[float, int]:
    n, m = map(int, pattern.split(":"))
    return -n / m, m


def plot(runs: Runs, model: str, file: Path) -> None:
    """Test accuracy over epochs, or bits over steps: a panel a pattern, a line a method, a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    patterns = sorted({pattern for name, pattern, _ in runs if name == model and pattern}, key=_sparsity) or [""]
    measure = measure_of(run for key, group in runs.items() if key[0] == model for run in group)
    figure, panels = plt.subplots(1, len(patterns), figsize=(4.6 * len(patterns), 3.6), sharey=True, squeeze=False)
    for axes, pattern in zip(panels[0], patterns, strict=True):
        for index, method in enumerate(TITLES):
            group = runs.get((model, "" if method == "dense" else pattern, method), ())
            if not group:
                continue
            length = min(len(run["curve"]) for run in group)
            at = [point for point, _ in group[0]["curve"][:length]]
            columns = [[measure.factor * run["curve"][point][1] for run in group] for point in range(length)]
            mean = [statistics.fmean(column) for column in columns]
            spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
            color = "#3d4654" if method == "dense" else f"C{index}"
            axes.plot(at, mean, color=color, label=TITLES[method], lw=1.6)
            low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=color, alpha=0.15, lw=0)
        axes.set_title(pattern or "dense")
        axes.set_xlabel(measure.unit)
        axes.grid(color="#e9ecf1")
    panels[0][0].set_ylabel(f"{model}: {measure.title}")
    panels[0][-1].legend(frameon=False)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
