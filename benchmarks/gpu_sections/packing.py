"""What a step of Bi-Mask on packed weights does before it multiplies: two masks, packing by the library and by our kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import table

from gpu_sections.timing import Found, in_turn, replayed
from nm_compiler.runtime.cusparselt import compress
from nm_compiler.solvers.two_masks import two_masks

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # [out, in]


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Milliseconds as CUDA graphs, bf16, 2:4; whether our kernels write what the library writes."""
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        print("no cuSPARSELt here")
        found["skipped"] = "no cuSPARSELt"
        return
    rows, found["packing"] = [], []
    for out, inputs in ((256, 128),) if dry else SHAPES:
        weight = torch.randn(out, inputs, device=device, dtype=torch.bfloat16)
        order, target = torch.randperm(out, device=device), torch.empty_like(weight)
        forward, turned = two_masks(weight, order, 2, 4)
        ours = compress.writes_as_library(forward)
        same = None
        if ours:
            packed, theirs = compress.compress(forward), torch._cslt_compress(forward)
            same = torch.equal(packed.view(torch.int16), theirs.view(torch.int16))
        work: dict[str, Callable[[], object]] = {
            "copy": partial(target.copy_, weight),
            "two masks": partial(two_masks, weight, order, 2, 4),
            "library packs": partial(torch._cslt_compress, forward),
            "ours packs": partial(compress.compress, forward),
            "ours packs the turned": partial(compress.compress, turned),
        }
        ms = in_turn({name: replayed(each) for name, each in work.items()}, device, repeats=2 if dry else 9, calls=3)
        rows.append(
            [
                f"{out}x{inputs}",
                *(f"{value:.3f}" for value in ms.values()),
                {None: "not used", True: "same", False: "WRONG"}[same],
            ]
        )
        found["packing"].append({"out": out, "in": inputs, "ms": ms, "bytes": same})
    print(table(["bf16, ms", *ms, "bytes"], rows), flush=True)
