"""A small GPT that predicts the next character of Python's own standard library: dense, ASP, SR-STE, LBC and Bi-Mask.

    python benchmarks/characters.py                        # 5,000 steps, 18 runs: for a GPU
    python benchmarks/characters.py --width 64 --context 64 --batch 8 --steps 1600 --lr 4e-3 --windows 512 --threads 1
    python benchmarks/cifar10_table.py --results benchmarks/results/characters    # the table of what is there

The second line is what one core can do in half an hour.
No data is needed but the Python that runs it. Runs that have their JSON are skipped; to begin anew, remove the folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from reproduction.grid import METHODS, PATTERNS, grid
from reproduction.language import Predicting, TextRecipe, write
from reproduction.text import standard_library

import nm_compiler as nm

RESULTS = Path(__file__).resolve().parent / "results" / "characters"


def main(given: list[str] | None = None) -> int:
    """Returns 1 if a run failed."""
    options = _parser().parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.device_count() else "cpu"))
    on_gpu = device.type == "cuda"
    recipe = TextRecipe(
        steps=options.steps,
        batch=options.batch,
        context=options.context,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        lr=options.lr,
        weight_decay=options.weight_decay,
        decay=options.decay,
        interval=options.interval,
        t_f=options.t_f,
        score_rate=options.score_rate,
        windows=options.windows,
        precision=options.precision or ("bf16" if on_gpu else "fp32"),
    )
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cells = grid([recipe.model], options.methods, options.patterns, seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    left = [cell for cell in cells if not (options.out / f"{cell.name}.json").exists()]
    text = standard_library()
    where = f"{device}, {recipe.precision}"
    print(f"{len(left)} of {len(cells)} runs of {recipe.steps} steps on {where}, {len(text.train):,} characters")
    failed, begin = 0, time.perf_counter()
    for cell in left:
        try:
            found = Predicting(cell, recipe, text, device, graphs=on_gpu and not options.no_graphs).train()
        except nm.NMError as error:
            print(f"{cell.name} FAILED: {error}", file=sys.stderr)
            failed += 1
            continue
        write(options.out / f"{cell.name}.json", found)
        at = time.perf_counter() - begin
        print(f"[{at:6.1f} s] {cell.name}: {found['bits']:.4f} bits per character, {found['how']}", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    recipe = TextRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON files go")
    parser.add_argument("--methods", nargs="+", default=["dense", "magnitude", "srste", "lbc", "bimask"], choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:16"], help=f"any N:M; the papers': {' '.join(PATTERNS)}")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=recipe.steps, help=f"default {recipe.steps}")
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--context", type=int, default=recipe.context, help="characters that a prediction may see")
    parser.add_argument("--width", type=int, default=recipe.width)
    parser.add_argument("--depth", type=int, default=recipe.depth)
    parser.add_argument("--heads", type=int, default=recipe.heads)
    parser.add_argument("--lr", type=float, default=recipe.lr, help="of AdamW")
    parser.add_argument("--weight-decay", type=float, default=recipe.weight_decay)
    parser.add_argument(
        "--decay", type=float, default=recipe.decay, help="of pruned weights, in the gradient (SR-STE, Bi-Mask)"
    )
    parser.add_argument("--interval", type=int, default=recipe.interval, help="steps between Bi-Mask's searches")
    parser.add_argument("--t-f", type=float, default=recipe.t_f, help="share of the steps at which LBC has decided")
    parser.add_argument(
        "--score-rate", type=float, default=recipe.score_rate, help="of LBC's scores, times that of the weights"
    )
    parser.add_argument("--windows", type=int, default=recipe.windows, help="of held-out text, at most")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 under autocast on a GPU")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
