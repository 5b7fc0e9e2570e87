"""The papers' CIFAR-10 tables again: dense, ASP, SR-STE, LBC, Bi-Mask on ResNet-32, ResNet-20, VGG-19 and MobileNetV2.

    python benchmarks/cifar10.py --data cifar10_jpeg.npz                       # the grid, 300 epochs, the papers' schedule
    python benchmarks/cifar10.py --data cifar10_jpeg.npz --minutes 6 --together   # as many epochs as end in 6 minutes
    python benchmarks/cifar10_table.py                                         # table and curves of what is there

Runs that have their JSON are skipped, runs that were stopped go on; to begin anew, remove the folder.
"""

from __future__ import annotations

import time

BEGIN = time.monotonic()

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from reproduction.grid import METHODS, PATTERNS, Recipe, grid  # noqa: E402
from reproduction.images import prepare  # noqa: E402
from reproduction.models import MODELS  # noqa: E402
from reproduction.pool import Place, run_all  # noqa: E402
from reproduction.together import run_together  # noqa: E402

import nm_compiler as nm  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "cifar10"
IMPORTS_S = 4.0  # what Python took before BEGIN, and takes to end


def main() -> int:
    """Returns 1 if a run failed."""
    options = _parser().parse_args()
    device = options.device or ("cuda" if torch.cuda.device_count() else "cpu")
    on_gpu = device.startswith("cuda")
    recipe = Recipe(
        epochs=options.epochs,
        batch=options.batch,
        lr=options.lr,
        weight_decay=options.weight_decay,
        smoothing=options.smoothing,
        interval=options.interval,
        t_f=options.t_f,
        limit=options.limit,
        precision=options.precision or ("bf16" if on_gpu else "fp32"),
        channels_last=options.channels_last or on_gpu,
        compiled=options.compile,
    )
    cells = grid(
        options.models, options.methods, options.patterns, range(options.first_seed, options.first_seed + options.seeds)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    left = [cell for cell in cells if not (options.out / f"{cell.name}.json").exists()]
    parallel = len(left) if options.together else max(1, min(options.parallel, len(left)))
    threads = max(1, (os.cpu_count() or 1) // (1 if options.together else max(1, parallel)))
    place = Place(device, options.out, on_gpu and not options.no_graphs and not recipe.compiled, threads)
    say = partial(_say, BEGIN)
    say(f"{len(left)} of {len(cells)} runs, {parallel} at a time on {device}, {recipe.precision}")
    if not left:
        return 0
    deadline = None if options.minutes is None else BEGIN + 60 * options.minutes - IMPORTS_S
    images = partial(prepare, options.data, options.cache or options.out, options.limit)
    try:
        if options.together:
            failed = run_together(left, recipe, place, images, say, deadline=deadline)
        else:
            failed = run_all(left, recipe, place, images, say, parallel=parallel, deadline=deadline)
    except nm.NMError as error:
        print(error, file=sys.stderr)
        return 1
    say(f"{len(left) - len(failed)} runs in {options.out}")
    return 1 if failed else 0


def _say(begin: float, line: str) -> None:
    print(f"[{time.monotonic() - begin:6.1f} s] {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10_jpeg.npz, or the folder with the python batches")
    parser.add_argument("--cache", type=Path, help="where decoded images go (default: --out)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON files go")
    parser.add_argument("--models", nargs="+", default=["resnet32x2"], choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=["dense", "srste", "lbc", "bimask"], choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:16"], help=f"any N:M; the papers': {' '.join(PATTERNS)}")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=recipe.epochs, help=f"default {recipe.epochs:.0f}, the papers'")
    parser.add_argument("--minutes", type=float, help="choose the epochs so that all ends in this time, start included")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, each in a process of its own")
    parser.add_argument("--together", action="store_true", help="all runs at once in one process, which a GPU shares better")
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--lr", type=float, default=recipe.lr)
    parser.add_argument("--weight-decay", type=float, default=recipe.weight_decay)
    parser.add_argument("--smoothing", type=float, default=recipe.smoothing, help="of labels")
    parser.add_argument("--interval", type=int, default=recipe.interval, help="steps between Bi-Mask's searches")
    parser.add_argument("--t-f", type=float, default=recipe.t_f, help="share of the steps at which LBC has decided")
    parser.add_argument("--limit", type=int, help="training images, and at most so many test images")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 under autocast on a GPU")
    parser.add_argument("--channels-last", action="store_true", help="always so on a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model; a minute or more each to start")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
