"""Magnitude masks of a large matrix: ours beside argsort, topk and enumeration, and beside a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from baselines.masks import WAYS
from harness import interleaved, table

from nm_compiler.pattern import Pattern
from nm_compiler.solvers.masks import masked, top_mask
from solver_sections.common import Run, verdict

CASES = (("2:4", 15.0), ("1:4", None), ("4:8", 9.0), ("2:8", None), ("1:16", 25.0))


def patterns(run: Run) -> list[dict[str, Any]]:
    """Seconds of each way on one float32 matrix, in turn."""
    size = 1024 if run.quick else 4096
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(run.seeds[0]))
    target, rows, found = torch.empty_like(weight), [], []
    for text, reach in CASES:
        nm = Pattern.parse(text)
        work: dict[str, Callable[[], object]] = {
            "copy": partial(target.copy_, weight),
            **{name: partial(way, weight, nm.n, nm.m) for name, way in WAYS.items()},
            "mask": partial(top_mask, weight, pattern=nm),
            "masked weight": partial(masked, weight, pattern=nm),
        }
        ways = interleaved(work, repeats=2 if run.quick else 7, warmup=1)
        faster = ways["argsort"].over(ways["mask"]).median
        beside_copy = ways["mask"].over(ways["copy"]).median
        rows.append([text, *(f"{1000 * spread.median:.1f}" for spread in ways.values()), f"{beside_copy:.2f}",
                     f"{faster:.1f}x", verdict(faster, reach)])  # fmt: skip
        found.append({"pattern": text, "size": size, "seconds": {k: v.as_json() for k, v in ways.items()},
                      "times_faster_than_argsort": faster, "of_a_copy": beside_copy, "reach": reach})  # fmt: skip
    head = [f"{size}x{size} fp32, ms", *ways, "mask / copy", "argsort / mask", "to reach"]
    print(table(head, rows), end="\n\n", flush=True)
    return found
