"""Everything that needs a GPU, in one run of a few minutes: numerics first, then what is fast and what is not.

    python benchmarks/gpu.py                    # on a machine with an NVIDIA GPU; make gpu
    python benchmarks/gpu.py --dry --device cpu # tiny shapes: that every line runs

A section that fails is reported in its place, and the others go on; whatever ends the script, what was measured is written.
Absolute times are medians between device events.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from gpu_sections import launches, lowered, masks, numerics, orders, packing, sparse_training, training
from gpu_sections.timing import Found
from harness import arguments, environment, write

SECTIONS: dict[str, Callable[[torch.device, bool, Found], None]] = {
    "numerics": numerics.measure, "masks": masks.measure, "packing": packing.measure, "launches": launches.measure,
    "orders": orders.measure, "training": training.measure, "lowered": lowered.measure,
    "sparse_training": sparse_training.measure,
}  # fmt: skip


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    if device.type != "cuda":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    sparse = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return {
        "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1), "capability": torch.cuda.get_device_capability(device),
        "cuda": torch.version.cuda, "cusparselt": sparse,
    }  # fmt: skip


def main(words: list[str]) -> int:
    """Run the sections, print, write. Returns how many failed."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "", "gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, any device: only that it runs")
    parser.add_argument("--only", default="", help=f"one of {', '.join(SECTIONS)}")
    given = parser.parse_args(words)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; --dry --device cpu shows that the script runs")
        return 1
    started = environment(torch.get_num_threads()) | {"gpu": hardware(device)}
    print(started["gpu"], flush=True)
    os.environ.setdefault("NM_COMPILER_CUSPARSELT", "direct")  # what waits for a GPU to be tried
    signal.signal(signal.SIGTERM, _stop)  # as `timeout` ends a process
    body: dict[str, Any] = {}
    try:
        for name in [name for name in SECTIONS if given.only in ("", name)]:
            print(f"\n== {name}", flush=True)
            begin, body[name] = time.perf_counter(), {}
            try:
                SECTIONS[name](device, given.dry, body[name])
            except Exception as error:
                body[name] |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
                print(body[name]["trace"], flush=True)
            body[name]["seconds"] = round(time.perf_counter() - begin, 1)
            print(f"-- {name}: {body[name]['seconds']:.0f} s", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        write(given.out, started, body)
    return sum("error" in each or bool(each.get("returncode")) for each in body.values())


def _stop(*_: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
