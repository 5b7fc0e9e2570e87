"""A Llama of 1.2 billion parameters on the meta device: what planning costs in time and memory, by depth.

    python benchmarks/llama_meta.py [--quick]

The shape of Llama 3.2 1B (width 2048, 32 heads and 8 of keys, hidden 8192, 128,256 words), 4, 8 and 16 layers; each in a
process of its own. compile: all of `nm.compile` without values, both modes captured. peak: memory above what the imports take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import arguments, environment, table, write
from workers import Row, each
from zoo.shim import declare_missing_operators

import nm_compiler as nm

BOUND_S = 90.0


def measure(layers: int) -> Iterator[Row]:
    """Seconds of `nm.show_axes` and of `nm.compile`, both capture included."""
    declare_missing_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=128_256))
    words = {"input_ids": torch.zeros(2, 64, dtype=torch.int64)}
    begin = time.perf_counter()
    axes = nm.show_axes(model, (), words)
    yield {"axes_seconds": time.perf_counter() - begin, "classes": len(axes), "free": len(axes.free)}
    begin = time.perf_counter()
    sparse = nm.compile(model, (), words)
    yield {"compile_seconds": time.perf_counter() - begin, "planned": len(sparse.plan.sites)}
    yield {"parameters": sum(p.numel() for p in model.parameters())}


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "", "llama_meta")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    started, rows, body = environment(options.threads), [], []
    for layers, row in each(measure, [2] if options.quick else [4, 8, 16], jobs=1, timeout=600):
        if "error" in row:
            raise SystemExit(row["error"])
        body.append({"layers": layers, **row})
        verdict = f"{BOUND_S:.0f} {'met' if row['compile_seconds'] <= BOUND_S else 'MISSED'}"
        rows.append([
            f"{layers} layers, {row['parameters'] / 1e9:.2f}e9", str(row["planned"]), f"{row['free']}/{row['classes']}",
            f"{row['axes_seconds']:.1f}", f"{row['compile_seconds']:.1f}", f"{row['peak_mib']:.0f}", verdict,
        ])  # fmt: skip
    print(table(["meta Llama", "N:M weights", "free classes", "show_axes s", "compile s", "peak MiB", "bound s"], rows))
    write(options.out, started, {"models": body})


if __name__ == "__main__":
    main(sys.argv[1:])
