"""What `nm.lower` costs in time and memory, each case in a fresh process.

    python benchmarks/lowering_cost.py [--quick] [--threads 2]

ResNet-50 and ViT-B/16 at batch 2, pruned to 2:4: to the plain graph, to it in float16, to an ONNX file, to the CPU kernels
with everything measured anew (which has no bound in time). peak: the high-water mark of resident memory during `nm.lower`
over what was resident before it, the model included, in models of float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compile_cost import MIB, MODELS, _bytes, _resident, _Tiny
from harness import Spread, against, arguments, environment, table, write

import nm_compiler as nm

CASES: dict[str, dict[str, Any]] = {
    "dense": {"backend": "dense"},
    "dense float16": {"backend": "dense", "dtype": torch.float16},
    "onnx": {"backend": "onnx"},
    "onnx float16": {"backend": "onnx", "dtype": torch.float16},
    "cpu": {"backend": "cpu"},
}
SECONDS, MEMORY = 30.0, 2.0  # the bounds


def child(model_name: str, case: str, threads: int) -> dict[str, float]:
    """One case, in this process; sizes in bytes. A tiny model goes first, so that imports do not count."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        small, image = _Tiny().eval(), torch.randn(2, 3, 8, 8)
        nm.lower(nm.freeze(nm.compile(small, (image,), method=nm.Magnitude())), (image,), **_options(case, folder, "tiny"))
        model, inputs = MODELS[model_name]().eval(), torch.randn(2, 3, 224, 224)
        model = nm.freeze(nm.compile(model, (inputs,), method=nm.Magnitude()))
        own, before = _bytes(model), _settled()
        Path("/proc/self/clear_refs").write_text("5")
        begin = time.perf_counter()
        lowered = nm.lower(model, (inputs,), **_options(case, folder, "model"))
        wall = time.perf_counter() - begin
        peak = _resident("VmHWM") - before + own
    return {"wall": wall, "model": own, "peak": peak, "ratio": peak / own, "products": len(lowered.result.products)}


def _settled() -> int:
    """What is resident without the garbage of what came before, which would hide as much of what follows."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident("VmRSS")


def _options(case: str, folder: str, name: str) -> dict[str, Any]:
    file = {"path": Path(folder) / f"{name}.onnx"} if case.startswith("onnx") else {}
    cache = {"cache": Path(folder) / f"{name}.json"} if case == "cpu" else {}
    return {**CASES[case], "options": {**file, **cache}}


def main(argv: Sequence[str]) -> None:
    """Measure in child processes, print, write."""
    if argv[:1] == ["--child"]:
        print(json.dumps(child(argv[1], argv[2], int(argv[3]))))
        return
    options = arguments("Time and memory of nm.lower", Path(__file__).stem).parse_args(argv)
    started, rows, body = environment(options.threads), [], dict[str, Any]()
    for model in MODELS:
        for case in CASES:
            command = [sys.executable, __file__, "--child", model, case, str(options.threads)]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                for _ in range(1 if options.quick else 3)
            ]
            wall, ratio = (Spread(tuple(run[key] for run in runs)) for key in ("wall", "ratio"))
            rows.append([
                model, case, str(runs[0]["products"]), f"{wall.median:.1f}",
                against(wall.median, None if case == "cpu" else SECONDS),
                f"{runs[0]['model'] / MIB:.0f}", f"{ratio.median:.2f}", against(ratio.median, MEMORY),
            ])  # fmt: skip
            body[f"{model}, {case}"] = {"wall_s": wall.as_json(), "peak_over_model": ratio.as_json()}
            print(rows[-1], flush=True)
    head = ["model", "case", "products", "s", "bound", "model MiB", "peak / model", "bound"]
    print(table(head, rows))
    write(options.out, started, body)


if __name__ == "__main__":
    main(sys.argv[1:])
