"""A Llama of 70 billion parameters on paper: bytes a rank, memory and time of a one-shot prune.

    python benchmarks/scale_plan.py                       # prints the tables of docs/scaling.md

Bytes are counted by `nm.plan_bytes` from shapes alone. Times are estimates: the bytes of the checkpoint over the speeds that
prune_speed.py measured on a checkpoint of 1.2 billion parameters (benchmarks/results/prune_speed.json).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import nm_compiler as nm
from nm_compiler.streaming.ordering import search_bytes

RANKS = (1, 8, 64)
SPEEDS = Path(__file__).resolve().parent / "results" / "prune_speed.json"
RATES = {"disk": 5e9, "link": 50e9, "memory": 2e12, "arithmetic": 400e12}
"""Bytes a second of an NVMe disk, of PCIe 5 x16, of an H200's memory (40 % of its data sheet); bf16 FLOP/s (40 % too)."""
SAMPLES = 128 * 2048
"""Tokens of Wanda's calibration: 128 samples of C4."""
METHODS: dict[str, tuple[nm.Method, str]] = {
    "LBC, by position": (nm.LBC(), "scores, live bits"),
    "LBC, by combination": (nm.LBC(scores="combination"), "scores, live bytes"),
    "Bi-Mask": (nm.BiMask(), "an order a weight"),
}


def llama_shapes(
    *, width: int = 8192, layers: int = 80, hidden: int = 28_672, heads: int = 64, keys: int = 8, words: int = 128_256
) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of 70 billion parameters as they stand."""
    key = width // heads * keys
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (key, width), "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }.items():  # fmt: skip
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return {**found, "model.norm.weight": (width,), "lm_head.weight": (words, width)}


def training() -> Iterator[str]:
    """Extra gigabytes a rank by method, for the ranks of `RANKS`."""
    shapes = llama_shapes()
    yield f"| GB a rank, 2:4, bf16 | beside every weight | optimizer | {' | '.join(f'ranks: {ranks}' for ranks in RANKS)} |"
    yield "| --- | --- | --- |" + " ---: |" * len(RANKS)
    for moments, optimizer in ((2, "Adam"), (1, "SGD, momentum")):
        dense = [nm.plan_bytes(shapes, ranks=ranks, moments=moments).dense for ranks in RANKS]
        yield f"| dense training, for comparison | | {optimizer} | {' | '.join(map(_gb, dense))} |"
        for name, (method, what) in METHODS.items():
            extra = [nm.plan_bytes(shapes, ranks=ranks, moments=moments, method=method).extra for ranks in RANKS]
            yield f"| {name} | {what} | {optimizer} | {' | '.join('+' + _gb(each) for each in extra)} |"


def parts() -> Iterator[str]:
    """What the extra bytes of one rank of 64 are, under Adam."""
    yield "| of one rank of 64, Adam | scores | their gradients | their moments | live, orders |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, (method, _) in METHODS.items():
        found = nm.plan_bytes(llama_shapes(), ranks=64, method=method)
        scores = found.state.get("scores", 0)
        other = sum(found.state.values()) - scores
        yield f"| {name} | {' | '.join(map(_gb, (scores, found.gradients, found.optimizer, other)))} |"


def pruning() -> Iterator[str]:
    """Memory and estimated time of `nm.prune_checkpoint`."""
    measured = json.loads(SPEEDS.read_text())["folders"]
    size = 2 * sum(math.prod(shape) for shape in llama_shapes().values())
    yield f"| {size / 1e9:.1f} GB in bf16, one process, one thread | measured, 1.2e9 parameters: MB/s | estimate for 70B |"
    yield "| --- | ---: | ---: |"
    for folder, found in measured.items():
        for name, one in found["works"].items():
            what = f"{name}, {'memory' if folder == '/dev/shm' else 'disk'} (wall time)"
            yield f"| {what} | {one['wall_mb_s']:.0f} | {_minutes(size / one['wall_mb_s'] / 1e6)} |"


def memory() -> Iterator[str]:
    """What a prune holds at most, beside Python and torch."""
    measured = json.loads(SPEEDS.read_text())["folders"]
    shapes = [shape for name, shape in llama_shapes().items() if ".layers.0." in name]
    layer = 2 * sum(math.prod(shape) for shape in shapes)
    most = max(found["peak_bytes"] for found in measured.values())
    hidden, width = next(shape for name, shape in llama_shapes().items() if "up_proj" in name)
    yield "| | GB |"
    yield "| --- | ---: |"
    yield f"| two layers of the model, for comparison | {_gb(2 * layer)} |"
    yield f"| prune, any importance (measured on 1.2e9 parameters; it does not depend on the size) | {_gb(most)} |"
    searched = _gb(search_bytes(hidden, width))
    yield f"| the order search of one layer's {hidden:,} hidden channels, in fp32 and as bytes | {searched} |"


def gpus() -> Iterator[str]:
    """Seconds of a prune that streams shards through GPUs, by the rates of `RATES`: arithmetic, nothing of it was run."""
    shapes = llama_shapes()
    linears = sum(math.prod(shape) for name, shape in shapes.items() if "proj" in name)
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    once = {
        "disk": 2 * size / RATES["disk"],  # read and written
        "link": size / RATES["link"],  # to a GPU and back, both directions at once
        "memory": 2 * (2 * linears) / RATES["memory"],  # weights read, masked weights written
        "arithmetic": 2 * linears * SAMPLES / RATES["arithmetic"],
    }
    what = {
        "disk": f"read and write the shards, a disk at {_rate('disk', 'GB/s')}",
        "link": f"to the GPU and back, {_rate('link', 'GB/s')} a direction",
        "memory": f"masks and masked weights, GPU memory at {_rate('memory', 'TB/s')}",
        "arithmetic": f"statistics for Wanda or RIA, {SAMPLES:,} tokens at {_rate('arithmetic', 'TFLOP/s')}",
    }
    machines = {"1 GPU": (1, 1), "8 GPUs, one disk": (8, 1), "8 GPUs, a disk each": (8, 8), "64 GPUs, 8 disks": (64, 8)}
    yield f"| seconds, on paper | {' | '.join(machines)} |"
    yield "| --- |" + " ---: |" * len(machines)
    taken = {name: {part: once[part] / (disks if part == "disk" else cards) for part in once}
             for name, (cards, disks) in machines.items()}  # fmt: skip
    for part, text in what.items():
        yield f"| {text} | {' | '.join(_seconds(each[part]) for each in taken.values())} |"
    streamed = [max(each["disk"], each["link"], each["memory"]) for each in taken.values()]
    yield f"| **magnitude**: the slowest, side by side | {' | '.join(map(_seconds, streamed))} |"
    whole = [first + each["arithmetic"] for first, each in zip(streamed, taken.values(), strict=True)]
    yield f"| **Wanda or RIA**: statistics first | {' | '.join(map(_seconds, whole))} |"


def _rate(name: str, unit: str) -> str:
    scale = 1e9 if unit == "GB/s" else 1e12
    return f"{RATES[name] / scale:.0f} {unit}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


def blocks() -> dict[str, str]:
    """Every table, by the comment that stands above it in docs/scaling.md."""
    return {make.__name__: "\n".join(make()) for make in (training, parts, memory, pruning, gpus)}


def main() -> Any:
    """Print."""
    torch.set_num_threads(1)
    for name, text in blocks().items():
        print(f"<!-- scale_plan: {name} -->\n{text}\n")


if __name__ == "__main__":
    main()
