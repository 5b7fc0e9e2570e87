"""Magnitude masks on the device: the library beside argsort and a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from baselines.masks import by_argsort
from harness import table

from gpu_sections.timing import Found, in_turn
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.masks import masked, top_mask

PATTERNS = ("2:4", "1:4", "4:8", "1:16")


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Milliseconds and bytes a second, 8192 x 8192."""
    size, rows, found["masks"] = 64 if dry else 8192, [], []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(size, size, device=device, dtype=dtype)
        target = torch.empty_like(weight)
        for text in PATTERNS:
            nm = Pattern.parse(text)
            assert torch.equal(top_mask(weight, pattern=nm).cpu(), magnitude_mask(weight.cpu(), nm.n, nm.m, -1))
            work: dict[str, Callable[[], object]] = {
                "copy": partial(target.copy_, weight),
                "argsort": partial(by_argsort, weight, nm.n, nm.m),
                "torch ops": partial(magnitude_mask, weight, nm.n, nm.m, -1),
                "mask": partial(top_mask, weight, pattern=nm),
                "bits": partial(top_mask, weight, pattern=nm, form="bits"),
                "masked weight": partial(masked, weight, pattern=nm),
            }
            ms = in_turn(work, device, repeats=2 if dry else 15)
            name = str(dtype).removeprefix("torch.")
            rows.append([f"{text} {name}", *(f"{value:.3f}" for value in ms.values()), f"{ms['mask'] / ms['copy']:.2f}",
                         f"{ms['argsort'] / ms['mask']:.1f}x"])  # fmt: skip
            found["masks"].append({"pattern": text, "dtype": name, "size": size, "ms": ms})
    print(table([f"{size}x{size}, ms", *ms, "mask / copy", "argsort / mask"], rows), flush=True)
