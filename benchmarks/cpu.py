"""N:M weights on the CPU: single layers, few tokens and whole networks, packed against torch's dense ways in the same run.

    python benchmarks/cpu.py [--quick] [--threads 1] [--isa avx2] [--patterns 2:4,1:4] [--sections layers,tokens,nets]
    python benchmarks/cpu.py --dtype bfloat16 --out results/cpu-bfloat16-1-thread.json ...
    python benchmarks/cpu.py --draw docs/cpu.svg results/cpu-nets-1-thread.json ...    # measures nothing

Ratios are of medians, interleaved: layers in a hot loop, few tokens on cold weights, networks a tenth of a second at a turn,
each in a process of its own: heaps and pages that others leave behind change what a small one takes.
gflops counts the multiplications that are left; beside it stands what this machine does at best in registers. A 2:4 product
at the speed of the registers' peak would be 2x of a dense one at its peak: ratios beyond about 1.6x mean that dense was slow.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import arguments, environment, table, write
from zoo.shim import declare_missing_operators

from nm_compiler.memory import keep_freed
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.library import Library, load

declare_missing_operators()  # before torchvision


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def layers(
    patterns: Sequence[str], library: Library, peak: float, repeats: int, quick: bool, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Print and return one table a pattern and kind."""
    from cpu_sections.layers import convolutions, linears

    found = []
    for text in patterns:
        pattern = Pattern.parse(text)
        kinds: list[tuple[str, list[dict[str, Any]]]] = [("linears", linears(pattern, repeats=repeats, dtype=dtype))]
        for batch in (1,) if quick else (1, 8):
            kinds += [
                (
                    f"convolutions {size}x{size}, batch {batch}",
                    convolutions(pattern, size, batch=batch, repeats=repeats, dtype=dtype),
                )
                for size in (1, 3)
            ]
        for kind, rows in kinds:
            ratios = [row["speedup"] for row in rows]
            mean, lowest = geometric_mean(ratios), min(ratios)
            print(f"\n{text} {kind}, {library.isa}: {mean:.2f}x in the geometric mean, lowest {lowest:.2f}x")
            head = ["layer", "dense ms", "packed ms", "speed-up", "GFLOP/s left", "of float32's peak"]
            print(table(head, [_layer(row, peak) for row in rows]))
            found.append({"pattern": text, "kind": kind, "mean": geometric_mean(ratios), "rows": rows})
    return found


def _layer(row: dict[str, Any], peak: float) -> list[str]:
    dense = min(value for key, value in row["ms"].items() if not key.startswith("packed"))
    packed = min(value for key, value in row["ms"].items() if key.startswith("packed"))
    share = f"{row['gflops'] / peak:.0%}"
    return [row["layer"], f"{dense:.3f}", f"{packed:.3f}", f"{row['speedup']:.2f}x", f"{row['gflops']:.0f}", share]


def tokens(patterns: Sequence[str], library: Library, reads: float, repeats: int) -> list[dict[str, Any]]:
    """Print and return one table a pattern and number of tokens."""
    from cpu_sections.tokens import tokens as measured

    found = []
    for text in patterns:
        for count in (1, 4, 16):
            rows = measured(Pattern.parse(text), count, library, repeats=repeats)
            print(f"\n{text}, {count} tokens, cold weights, {library.isa}; one thread reads up to {reads:.1f} GB/s")
            head = [
                "layer",
                "over float32",
                "bf16/bf16",
                "int8/float32",
                "bytes",
                "dense GB/s",
                "packed",
                "read",
                "packed/read",
            ]
            body = [
                [row["layer"], f"{row['speedup']:.2f}x", f"{row['bf16 over bf16']:.2f}x", f"{row['int8 over float32']:.2f}x",
                 f"{row['share']:.3f}", *(f"{row['gbytes'][way]:.1f}" for way in ("dense", "packed", "read")),
                 f"{row['of reading']:.0%}"]
                for row in rows
            ]  # fmt: skip
            print(table(head, body))
            found.append({"pattern": text, "tokens": count, "rows": rows})
    return found


def alone(name: str, pattern: str, repeats: int, threads: int, against: str, dtype: torch.dtype) -> dict[str, Any]:
    """A network, in the process that this is called in."""
    from cpu_sections.nets import net

    torch.set_num_threads(threads)
    return net(name, pattern, repeats=repeats, against=against, dtype=dtype)


def nets(
    patterns: Sequence[str], repeats: int, quick: bool, only: str, against: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Print and return one table a pattern."""
    from cpu_sections.nets import NETS

    found = []
    for text in patterns:
        names = [name for name in NETS if (not quick or "block" in name) and fnmatch(name, only)]
        rows = []
        for name in names:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows.append(process.submit(alone, name, text, repeats, torch.get_num_threads(), against, dtype).result())
        print(f"\n{text}, whole networks, ms")
        head = [
            "network",
            "eager",
            "inductor",
            "packed",
            "and compiled",
            "over inductor",
            "and compiled",
            "over eager",
            "packed products",
        ]
        body = [
            [row["net"], f"{min(v for k, v in row['ms'].items() if k.startswith('eager')):.1f}",
             *(f"{row['ms'][way]:.1f}" for way in ("inductor", "packed", "packed, inductor")),
             *(f"{row[over]:.2f}x" for over in ("over inductor", "compiled over inductor", "over eager")),
             f"{row['sparse']} of {row['products']}"]
            for row in rows
        ]  # fmt: skip
        print(table(head, body))
        found += rows
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections that were asked for."""
    parser = arguments(__doc__ or "", "cpu")
    parser.add_argument("--patterns", default="2:4,1:4,2:8,1:16", help="of layers and few tokens; networks: --nets")
    parser.add_argument("--nets", default="2:4", help="patterns of whole networks")
    parser.add_argument("--only", default="*", help="a glob over the names of whole networks")
    parser.add_argument("--against", default="eager", choices=("eager", "inductor"), help="what networks are lowered against")
    parser.add_argument("--sections", default="layers,tokens,nets", help="which tables")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of layers and networks")
    parser.add_argument("--isa", default=None, help="portable, avx2 or avx512; the best by default")
    parser.add_argument("--draw", type=Path, nargs="+", help="a picture, and the results to draw")
    args = parser.parse_args(argv)
    if args.draw:
        from cpu_sections.picture import draw

        draw(args.draw[1:], args.draw[0])
        return 0
    torch.set_num_threads(args.threads)
    keep_freed()  # as in every process that lowers a model: else results come in fresh pages, dense ones too
    if args.isa is not None:
        os.environ["NM_COMPILER_ISA"] = args.isa
    library = load()
    if isinstance(library, str):
        print(f"nothing to measure: {library}", file=sys.stderr)
        return 1
    from cpu_sections.machine import limits

    started, machine = environment(args.threads), limits(library)
    reads = f"{machine['gbytes']:.1f} GB/s from memory, {machine['gbytes in huge pages']:.1f} from huge pages"
    print(f"one thread, {library.isa}: {machine['gflops']:.0f} GFLOP/s in registers, {reads}")
    patterns, wanted = args.patterns.split(","), args.sections.split(",")
    repeats = 3 if args.quick else 15
    dtype = getattr(torch, args.dtype)
    body: dict[str, Any] = {"isa": library.isa, "dtype": args.dtype, "halves": library.halves, "machine": machine}
    if "layers" in wanted:
        peak = machine["gflops"] * args.threads
        body["layers"] = layers(patterns, library, peak, repeats, args.quick, dtype)
    if "tokens" in wanted:
        body["tokens"] = tokens(
            patterns[:1] if args.quick else patterns[:2], library, machine["gbytes in huge pages"], repeats
        )
    if "nets" in wanted:
        body["nets"] = nets(args.nets.split(","), repeats, args.quick, args.only, args.against, dtype)
    write(Path(args.out), started, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
