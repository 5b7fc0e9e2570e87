"""How long the host is busy with one product on a packed weight: torch's call, and the library called directly."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from harness import table
from torch.nn import functional

from gpu_sections.timing import Found, Work
from nm_compiler.runtime.cusparselt.direct import binding
from nm_compiler.runtime.cusparselt.op import cslt_linear, multiply
from nm_compiler.runtime.cusparselt.packing import pack
from nm_compiler.solvers.masks import masked


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Microseconds until Python goes on, median, of a product that takes the GPU less."""
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        print("no cuSPARSELt here")
        found["skipped"] = "no cuSPARSELt"
        return
    weight = masked(torch.randn(256, 256, device=device, dtype=torch.bfloat16), pattern="2:4")
    packed, x = pack(weight), torch.randn(64, 256, device=device, dtype=torch.bfloat16)
    wanted = functional.linear(x.float(), weight.float())
    ways: dict[str, tuple[str, Work]] = {
        "dense": ("torch", partial(functional.linear, x, weight)),
        "torch's call": ("torch", partial(cslt_linear, x, packed, None, 256, 256, 0, True)),
        "the op, direct": ("direct", partial(cslt_linear, x, packed, None, 256, 256, 0, True)),
        "direct, without an op": ("direct", partial(multiply, packed, x, None, 256, rows=True)),
    }
    rows, found["launches"] = [], {}
    for name, (wish, work) in ways.items():
        with _wish(wish):
            if wish == "direct" and binding(device) is None:
                print("the library is not called directly here")
                continue
            result = work()
            assert isinstance(result, torch.Tensor)
            error = float((result.float() - wanted).norm() / wanted.norm())
            us = 1e6 * median(_busy(work) for _ in range(5 if dry else 200))
        rows.append([name, f"{us:.0f}", f"{error:.0e}"])
        found["launches"][name] = {"us": us, "error": error}
    print(table(["[64, 256] x [256, 256], bf16", "us of the host", "error"], rows), flush=True)


def _busy(work: Work) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextmanager
def _wish(way: str) -> Iterator[None]:
    before = os.environ.get("NM_COMPILER_CUSPARSELT")
    os.environ["NM_COMPILER_CUSPARSELT"] = way
    try:
        yield
    finally:
        if before is None:
            del os.environ["NM_COMPILER_CUSPARSELT"]
        else:
            os.environ["NM_COMPILER_CUSPARSELT"] = before
