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
from functools import partial
from typing import Any

import torch
from ablations import orders, retirement
from ablations.digits import Training
from harness import arguments, environment, write

from nm_compiler.demo.data import Dataset, digits

Rows = list[dict[str, Any]]
COLUMNS: dict[str, list[tuple[str, str, float, int]]] = {
    "orders": [
        ("B keeps of Σ\\|W ⊙ F\\|, %", "kept", 100, 2), ("of the non-zeros, %", "count_kept", 100, 2),
        ("gradient gap, %", "gap", 100, 2), ("test accuracy, %", "accuracy", 100, 2),
    ],
    "retirement": [
        ("revived, per 100 groups", "revived", 1, 1), ("mask entries 0 to 1", "restored", 1, 1),
        ("1 to 0", "removed", 1, 1), ("won after retirement, % of groups", "returned_won", 100, 2),
        ("lowest live score", "lowest", 1, 3), ("test accuracy, %", "accuracy", 100, 2),
    ],
}  # fmt: skip
"""Title, key of a run, factor and digits."""


def main(given: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "", "ablation")
    parser.add_argument("--only", choices=COLUMNS, help="this one")
    parser.add_argument("--patterns", nargs="+", help="of those that there are")
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
    data, epochs = digits(), 2 if options.quick else options.epochs
    for name in [options.only] if options.only else COLUMNS:
        started = environment(options.threads)
        rows: Rows = []
        for seed in range(1 if options.quick else options.seeds):
            for pattern, case, measure in _cases(name, data, epochs, options.interval):
                if options.patterns and pattern not in options.patterns:
                    continue
                begin = time.perf_counter()
                rows.append({"case": case, "pattern": pattern, "seed": seed, **measure(seed)})
                print(f"{name}, {pattern}, {case}, seed {seed}: {time.perf_counter() - begin:.1f} s", flush=True)
        print("\n" + markdown(name, rows))
        settings = {"epochs": epochs, "interval": options.interval} if name == "orders" else {"epochs": epochs}
        old = {**old, name: rows, "settings": {**old.get("settings", {}), name: settings}}
        write(options.out, started, {key: value for key, value in old.items() if key != "environment"})


def _cases(name: str, data: Dataset, epochs: int, interval: int) -> list[tuple[str, str, Callable[[int], dict[str, Any]]]]:
    """Pattern, name, and a function of the seed."""
    sgd = Training(data, epochs)
    if name == "orders":
        return [
            (pattern, variant, partial(orders.measure, sgd, variant, interval, pattern))
            for pattern in ("2:4", "1:4")
            for variant in orders.VARIANTS
        ]
    less = retirement.LESS
    trainings = [(pattern, "SGD", sgd, 1.0) for pattern in ("2:4", "1:4", "4:8")]
    trainings += [("4:8", "AdamW", Training.with_adam(data, epochs), 1.0)]
    trainings += [(pattern, f"SGD, scores begun at {less:g} of that", sgd, less) for pattern in ("2:4", "1:4")]
    return [
        (pattern, f"{about}, {variant}", partial(retirement.measure, training, variant, pattern, start))
        for pattern, about, training, start in trainings
        for variant in retirement.VARIANTS[start < 1 or training.adam :]
    ]


def markdown(name: str, rows: Rows) -> str:
    """A row a pattern and a case: mean ± standard deviation over the seeds."""
    columns = COLUMNS[name]
    lines = [
        f"| {name} | " + " | ".join(title for title, *_ in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for pattern, case in dict.fromkeys((row["pattern"], row["case"]) for row in rows):
        group = [row for row in rows if (row["pattern"], row["case"]) == (pattern, case)]
        cells = [_cell([factor * row[key] for row in group], digits) for _, key, factor, digits in columns]
        lines.append(f"| {pattern}, {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
