"""Single layers, in a hot loop: packed against the best dense way that torch has."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from cpu_sections.weights import convolution, linear, medians, pack, random_weight
from nm_compiler.pattern import Pattern

LINEARS = [
    (197, 768, 768), (197, 768, 3072), (197, 3072, 768), (128, 768, 768), (128, 768, 3072), (128, 3072, 768),
    (512, 1024, 4096), (64, 4096, 4096), (256, 512, 512), (64, 4096, 11008),
]  # fmt: skip
"""tokens, in, out: ViT-B, BERT-base, and larger."""
POINTWISE = [(64, 256, 56), (256, 64, 56), (512, 128, 28), (128, 512, 28), (1024, 256, 14), (256, 1024, 14), (2048, 512, 7)]
SPATIAL = [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)]
"""in, out, height and width: ResNet-50's."""


def linears(pattern: Pattern, *, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Each of `LINEARS` against F.linear and addmm of the turned weight; transposes are inside the packed time.

    dtype: of data, weights and results.
    """
    rows = []
    for tokens, width, out in LINEARS:
        weight, x, bias = (
            random_weight((out, width), pattern).to(dtype),
            torch.randn(tokens, width).to(dtype),
            torch.randn(out),
        )
        turned, packed, own = weight.t().contiguous(), pack(weight, pattern, dtype=dtype), bias.to(dtype)
        work: dict[str, Any] = {
            "linear": partial(functional.linear, x, weight, own),
            "addmm": partial(torch.addmm, own, x, turned),
            "packed": linear(packed, x, bias),
        }
        rows.append(_row(f"{tokens} tokens, {width} to {out}", work, tokens * width * out * 2 * pattern.density, repeats))
    return rows


def convolutions(pattern: Pattern, size: int, *, batch: int, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """1x1 or 3x3, both ways in both layouts: the best packed against the best dense one."""
    rows = []
    for inputs, out, side in POINTWISE if size == 1 else SPATIAL:
        weight, bias = random_weight((out, inputs, size, size), pattern).to(dtype), torch.randn(out)
        x, packed = torch.randn(batch, inputs, side, side).to(dtype), pack(weight, pattern, dtype=dtype)
        work: dict[str, Any] = {}
        for name, form in (("rows", torch.contiguous_format), ("channels last", torch.channels_last)):
            there, kernel = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
            work[f"dense {name}"] = partial(functional.conv2d, there, kernel, bias.to(dtype), padding=size // 2)
            work[f"packed {name}"] = convolution(packed, there, bias)
        flops = batch * side * side * inputs * out * size * size * 2 * pattern.density
        rows.append(_row(f"{size}x{size}, {inputs} to {out}, {batch}x{side}x{side}", work, flops, repeats))
    return rows


def _row(name: str, work: dict[str, Any], flops: float, repeats: int) -> dict[str, Any]:
    """Medians in ms; speed-up of the best packed over the best dense way; GFLOP/s of the multiplications that are left."""
    times = medians(work, repeats)
    packed = min(value for key, value in times.items() if key.startswith("packed"))
    dense = min(value for key, value in times.items() if not key.startswith("packed"))
    return {
        "layer": name, "ms": {key: value * 1e3 for key, value in times.items()}, "speedup": dense / packed,
        "gflops": flops / packed / 1e9,
    }  # fmt: skip
