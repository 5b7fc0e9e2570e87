"""Masks and orders: ours beside what the papers, apex and RIA do, in one run and with the same compiled inner loops.

    python benchmarks/solvers.py [--quick] [--only orders] [--seeds 5]

One thread; compilation is not counted (every kernel runs once before). Matrices come from seeds drawn afresh, which the JSON
keeps. See README.md for the columns.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import arguments, environment, write
from solver_sections import backward, curves, masks, orders, tiles
from solver_sections.common import Run


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "", "solvers")
    parser.set_defaults(threads=1)
    parser.add_argument("--seeds", type=int, default=5, help="matrices of each kind")
    parser.add_argument("--first-seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the matrices")
    parser.add_argument(
        "--only", default="", help="one section: orders, patterns, widest, backward, transposable, masks, curves"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    started = environment(options.threads)
    count = 1 if options.quick else options.seeds
    run = Run(tuple(range(options.first_seed, options.first_seed + count)), options.quick)
    picture = options.out.with_suffix(".svg")
    sections: dict[str, Callable[[], Any]] = {
        "orders": lambda: orders.sizes(run),
        "patterns": lambda: orders.patterns(run),
        "widest": orders.widest,
        "backward": lambda: backward.sizes(run),
        "transposable": lambda: tiles.patterns(run),
        "masks": lambda: masks.patterns(run),
        "curves": lambda: curves.draw(run, picture),
    }
    body = {name: work() for name, work in sections.items() if options.only in ("", name)}
    write(options.out, started, {"seeds": list(run.seeds), **body})


if __name__ == "__main__":
    main(sys.argv[1:])
