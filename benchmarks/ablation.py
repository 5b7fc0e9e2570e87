"""Choices of Bi-Mask and LBC, one at a time, on the demo's digits: the backward order, and whether retirement is for good.

python benchmarks/ablation.py --threads 1              # 15 minutes on one core
python benchmarks/ablation.py --only orders --quick
python benchmarks/ablation.py --markdown               # the tables of what is there
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ablations import orders, retirement
from ablations.digits import Training
from harness import arguments, environment, write

from nm_compiler.demo.data import digits

Rows = list[dict[str, Any]]
COLUMNS: dict[str, list[tuple[str, str, float, int]]] = {
    "orders": [
        ("B keeps of Σ\\|W ⊙ F\\|, %", "kept", 100, 2), ("of the non-zeros, %", "count_kept", 100, 2),
        ("gradient gap, %", "gap", 100, 2), ("test accuracy, %", "accuracy", 100, 2),
    ],
    "retirement": [
        ("revived, per 100 groups", "revived", 1, 1), ("mask entries 0 to 1", "restored", 1, 1),
        ("1 to 0", "removed", 1, 1), ("won after retirement, % of groups", "returned_won", 100, 2),
        ("test accuracy, %", "accuracy", 100, 2),
    ],
}  # fmt: skip
"""Title, key of a run, factor and digits."""


def main(given: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "", "ablation")
    parser.add_argument("--only", choices=COLUMNS, help="this one")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "1:16"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--interval", type=int, default=20, help="steps between searches: 20 of them in a training")
    parser.add_argument("--markdown", action="store_true", help="measure nothing")
    options = parser.parse_args(given)
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.markdown:
        print("\n\n".join(markdown(name, old[name]) for name in COLUMNS if name in old))
        return
    torch.set_num_threads(options.threads)
    started = environment(options.threads)
    training = Training(digits(), 2 if options.quick else options.epochs)
    seeds = range(1 if options.quick else options.seeds)
    work: dict[str, Callable[[str, str, int], dict[str, Any]]] = {
        "orders": lambda variant, pattern, seed: orders.measure(training, variant, pattern, seed, options.interval),
        "retirement": lambda variant, pattern, seed: retirement.measure(training, variant, pattern, seed),
    }
    variants = {"orders": tuple(orders.VARIANTS), "retirement": retirement.VARIANTS}
    found: dict[str, Rows] = {name: old[name] for name in COLUMNS if options.only and name in old}
    for name in [options.only] if options.only else COLUMNS:
        found[name] = []
        for seed in seeds:
            for pattern in options.patterns:
                for variant in variants[name]:
                    begin = time.perf_counter()
                    row = {"variant": variant, "pattern": pattern, "seed": seed, **work[name](variant, pattern, seed)}
                    found[name].append(row)
                    print(f"{name}, {variant}, {pattern}, seed {seed}: {time.perf_counter() - begin:.1f} s", flush=True)
        print("\n" + markdown(name, found[name]) + "\n")
    settings = {
        "epochs": training.epochs, "steps": training.steps, "batch": training.batch, "lr": training.lr,
        "momentum": training.momentum, "weight_decay": training.weight_decay, "interval": options.interval,
    }  # fmt: skip
    write(options.out, started, {"settings": settings, **found})


def markdown(name: str, rows: Rows) -> str:
    """A row a pattern and a variant: mean ± standard deviation over the seeds."""
    columns = COLUMNS[name]
    lines = [
        f"| {name} | " + " | ".join(title for title, *_ in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for pattern, variant in dict.fromkeys((row["pattern"], row["variant"]) for row in rows):
        group = [row for row in rows if (row["pattern"], row["variant"]) == (pattern, variant)]
        cells = [_cell([factor * row[key] for row in group], digits) for _, key, factor, digits in columns]
        lines.append(f"| {pattern}, {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
