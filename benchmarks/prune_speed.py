"""How fast a checkpoint of 1.2 billion parameters is pruned, beside copying it: what the disk allows.

    python benchmarks/prune_speed.py [--folder /tmp /dev/shm] [--quick]

The shape of Llama 3.2 1B in bfloat16 (width 2048, hidden 8192, 16 layers, 128,256 words), random, in 8 shards, written to each
folder and removed afterwards. prune: `nm.prune_checkpoint`, reading back and verifying included; copy: the same files with
plain reads and writes, flushed to the disk file by file as prune does. In turn, round by round; the source is dropped from
the page cache before each. Per core: bytes by the seconds that the process computed (or the system for it), with one thread.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import Spread, arguments, environment, table, write
from safetensors.torch import save_file
from torch import Tensor
from workers import Row, each

import nm_compiler as nm
from nm_compiler.streaming.folder import INDEX

BOUND = 300.0  # MB of weights a second and core
LAYERS, WIDTH, HIDDEN, WORDS, KEYS = 16, 2048, 8192, 128_256, 512


def tensors(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer; the embedding comes with the first."""
    if layer == 0:
        yield "model.embed_tokens.weight", (WORDS, WIDTH)
    for name, shape in {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
        "mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
    }.items():  # fmt: skip
        yield f"model.layers.{layer}.{name}.weight", shape


def make(folder: Path, layers: int, shards: int) -> Iterator[Row]:
    """Write the checkpoint, shard by shard. Yields its parameters and those of its linears."""
    folder.mkdir()
    where, count, linear = dict[str, str](), 0, 0
    for shard in range(shards):
        made: dict[str, Tensor] = {}
        for layer in range(layers * shard // shards, layers * (shard + 1) // shards):
            for name, shape in tensors(layer):
                made[name] = torch.randn(shape, dtype=torch.bfloat16)
                count += made[name].numel()
                linear += made[name].numel() if "proj" in name else 0
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(made, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(made, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    norms = {name: torch.rand(shape[1]) for layer in range(layers) for name, shape in tensors(layer) if "proj" in name}
    save_file(norms, folder.with_name("norms.safetensors"))
    yield {"parameters": count, "linear": linear}


def copy(source: Path, target: Path) -> None:
    """File by file, flushed."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as here, (target / path.name).open("wb") as there:
            space = memoryview(bytearray(1 << 20))
            while got := here.readinto(space):
                there.write(space[:got])
            there.flush()
            os.fsync(there.fileno())


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Taken:
    """Seconds of every round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(parent: Path, layers: int, shards: int, rounds: int) -> dict[str, Any]:
    """All variants in one folder."""
    place = Path(tempfile.mkdtemp(prefix="nm_prune_speed_", dir=parent))
    try:
        source, out, norms = place / "dense", place / "out", place / "norms.safetensors"
        made = each(lambda _: make(source, layers, shards), [None], jobs=1, timeout=600)  # its memory is not prune's
        row = next(made)[1]
        if "error" in row:
            raise SystemExit(row["error"])
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        works: dict[str, Callable[[], object]] = {
            "copy": lambda: copy(source, out),
            "prune magnitude": lambda: nm.prune_checkpoint(source, out),
            "prune wanda": lambda: nm.prune_checkpoint(source, out, importance="wanda", statistics=norms),
            "prune ria": lambda: nm.prune_checkpoint(source, out, importance="ria", statistics=norms),
        }
        taken = {name: Taken() for name in works}
        before, peak = _peak(), 0
        names = list(works)
        for number in range(rounds):  # whoever comes first finds the disk busy with what was before: it takes turns
            for name in names[number % len(names) :] + names[: number % len(names)]:
                work = works[name]
                forget(source)
                wall, cpu = time.perf_counter(), time.process_time()
                work()
                taken[name].cpu.append(time.process_time() - cpu)
                taken[name].wall.append(time.perf_counter() - wall)
                peak = max(peak, _peak() - before)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(place)
    base = Spread(tuple(taken["copy"].wall))
    found = {
        name: {
            "wall_mb_s": size / 1e6 / Spread(tuple(one.wall)).median,
            "per_core_mb_s": size / 1e6 / Spread(tuple(one.cpu)).median,
            "wall_over_copy": Spread(tuple(one.wall)).over(base).median,
            "wall": Spread(tuple(one.wall)).as_json(), "cpu": Spread(tuple(one.cpu)).as_json(),
        }
        for name, one in taken.items()
    }  # fmt: skip
    layer = 2 * sum(torch.Size(shape).numel() for _, shape in tensors(1))
    counts = {"parameters": row["parameters"], "linear": row["linear"], "bytes": size, "layer_bytes": layer}
    return {**counts, "peak_bytes": peak, "works": found}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warm(folder: Path) -> None:
    """Load what pruning loads, kernels too."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "dense"
        path.mkdir()
        save_file({"up_proj.weight": torch.randn(512, 512, dtype=torch.bfloat16)}, path / "model.safetensors")
        save_file({"up_proj.weight": torch.rand(512)}, Path(place) / "norms")
        for rule in ("magnitude", "wanda", "ria"):
            norms = None if rule == "magnitude" else Path(place) / "norms"
            nm.prune_checkpoint(path, Path(place) / rule, importance=rule, statistics=norms)


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "", "prune_speed")
    parser.add_argument("--folder", nargs="+", type=Path, default=[Path(tempfile.gettempdir())], help="disks to write to")
    parser.set_defaults(threads=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    started, rows, body = environment(options.threads), [], dict[str, Any]()
    warm(options.folder[0])
    for folder in options.folder:
        found = measure(folder, *((2, 2, 1) if options.quick else (LAYERS, 8, 4)))
        body[str(folder)] = found
        for name, one in found["works"].items():
            bound = "" if name != "prune magnitude" else f"{BOUND:.0f} {'met' if one['per_core_mb_s'] >= BOUND else 'MISSED'}"
            speeds = [f"{one['wall_mb_s']:.0f}", f"{one['wall_over_copy']:.2f}", f"{one['per_core_mb_s']:.0f}"]
            rows.append([f"{folder} {name}", *speeds, bound])
        print(
            f"{folder}: {found['parameters'] / 1e9:.2f}e9 parameters, {found['bytes'] / 1e9:.2f} GB; memory at most "
            f"{found['peak_bytes'] / 2**20:.0f} MiB above the start, two layers are {2 * found['layer_bytes'] / 2**20:.0f} MiB"
        )
    print(table(["", "MB/s wall", "x copy", "MB/s a core", "bound"], rows))
    write(options.out, started, {"folders": body})


if __name__ == "__main__":
    main(sys.argv[1:])
