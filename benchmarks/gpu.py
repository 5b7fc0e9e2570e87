"""Everything that needs a GPU, in one run of a few minutes: numerics first, then what is fast and what is not.

    python benchmarks/gpu.py                    # on a machine with an NVIDIA GPU; make gpu
    python benchmarks/gpu.py --dry --device cpu # tiny shapes: that every line runs

A section that fails is reported in its place, and the others go on. Absolute times are medians between device events.
"""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any

import torch
from gpu_sections import lowered, masks, numerics, sparse_products, sparse_training, training
from harness import arguments, environment, write

SECTIONS = {
    "numerics": numerics.measure, "masks": masks.measure, "sparse_products": sparse_products.measure,
    "lowered": lowered.measure, "sparse_training": sparse_training.measure, "training": training.measure,
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
    body: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if given.only not in ("", name):
            continue
        print(f"\n== {name}", flush=True)
        begin = time.perf_counter()
        try:
            body[name] = section(device, given.dry)
        except Exception as error:
            body[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
            print(body[name]["trace"], flush=True)
        print(f"-- {name}: {time.perf_counter() - begin:.0f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(given.out, started, body)
    return sum(isinstance(each, dict) and ("error" in each or bool(each.get("returncode"))) for each in body.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
