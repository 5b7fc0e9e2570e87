"""What `nm.compile` costs in time and memory, each case in a fresh process.

    python benchmarks/compile_cost.py [--quick] [--threads 2]

See README.md for what the columns mean.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Spread, against, arguments, environment, table, write
from networks import ResNet50, ViTB16
from torch import Tensor, nn

import nm_compiler as nm

MODELS: dict[str, type[nn.Module]] = {"ResNet-50": ResNet50, "ViT-B/16": ViTB16}
METHODS: dict[str, type[nm.LBC] | type[nm.BiMask]] = {"LBC": nm.LBC, "BiMask": nm.BiMask}
SECONDS, MEMORY = 15.0, 1.2  # the bounds
MIB = 2**20


class _Tiny(nn.Module):
    """One of each kind of layer: compiling it makes torch import what an export needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.fc(self.bn(self.conv(self.stem(x))).mean((2, 3))))
        return y


def child(model_name: str, method_name: str, *, warm: bool, threads: int) -> dict[str, float]:
    """One case, in this process. torch and nm_compiler are imported already; sizes in bytes.

    The kernel's high-water mark is set back just before `nm.compile`, so that building the model does not count.
    ``ratio`` is what the process grew by, model included, over the bytes of the model and of what compile added to it.
    """
    torch.set_num_threads(threads)
    if warm:
        nm.compile(_Tiny(), (torch.randn(2, 3, 8, 8),), method=METHODS[method_name]())
        gc.collect()  # what the tiny one left in cycles is not to make room for the other, or not to
    inputs = torch.randn(2, 3, 224, 224)
    empty = _resident("VmRSS")
    model = MODELS[model_name]()
    own = _bytes(model)
    built = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    sparse = nm.compile(model, (inputs,), method=METHODS[method_name]())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak, after = _resident("VmHWM"), _resident("VmRSS")
    total = _bytes(sparse)
    return {
        "wall_seconds": wall, "cpu_seconds": cpu, "empty": empty, "built": built, "peak": peak, "after": after,
        "model": own, "extras": total - own, "ratio": (peak - empty) / total,
        "weights": len(sparse.plan.sites),
    }  # fmt: skip


def _resident(key: str) -> int:
    """``VmRSS``, resident now, or ``VmHWM``, the most so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _bytes(model: nn.Module) -> int:
    """Parameters and buffers, shared ones once."""
    state = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in state.values())


def run(model: str, method: str, *, warm: bool, threads: int) -> dict[str, float]:
    """One case in a fresh process."""
    words = [sys.executable, __file__, "--child", model, method, "warm" if warm else "cold", "--threads", str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(model: str, method: str, *, warm: bool, threads: int, repeats: int) -> tuple[list[str], dict[str, Any]]:
    """A row of the table and an entry of the JSON."""
    runs = [run(model, method, warm=warm, threads=threads) for _ in range(repeats)]
    spread = {key: Spread(tuple(each[key] for each in runs)) for key in runs[0]}
    mid = {key: values.median for key, values in spread.items()}
    wall, low, high = mid["wall_seconds"], *(f(spread["wall_seconds"].values) for f in (min, max))
    row = [
        f"{model} {method}", "warm" if warm else "cold", f"{wall:.1f}", f"{low:.1f}-{high:.1f}", f"{mid['cpu_seconds']:.1f}",
        against(wall, SECONDS), f"{mid['model'] / MIB:.0f}", f"{mid['extras'] / MIB:.0f}",
        f"{(mid['peak'] - mid['empty']) / MIB:.0f}", f"{mid['ratio']:.2f}", against(mid["ratio"], MEMORY if warm else None),
    ]  # fmt: skip
    return row, {key: values.as_json() for key, values in spread.items()}


def main(flags: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = arguments("Time and memory of nm.compile", Path(__file__).stem)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each case")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "METHOD", "WARM"), help="measure one case in this process")
    given = parser.parse_args(flags)
    if given.child:
        model, method, warm = given.child
        print(json.dumps(child(model, method, warm=warm == "warm", threads=given.threads)))
        return
    started = environment(given.threads)
    repeats = 1 if given.quick else given.repeats
    rows, found = [], {}
    for model in MODELS:
        for method in METHODS:
            for warm in (False, True):
                row, entry = measured(model, method, warm=warm, threads=given.threads, repeats=repeats)
                rows.append(row)
                found[f"{model} {method} {'warm' if warm else 'cold'}"] = entry
    head = ["case", "export", "wall s", "range", "cpu s", "bound", "model MiB", "extras MiB", "peak MiB", "x both", "bound"]
    print(f"\nnm.compile, 2:4, median of {repeats} fresh processes each\n{table(head, rows)}")
    write(given.out, started, {"cases": found, "bounds": {"seconds": SECONDS, "memory": MEMORY}})


if __name__ == "__main__":
    main(sys.argv[1:])
