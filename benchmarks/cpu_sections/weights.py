"""Random N:M weights and the packed products that read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness import interleaved, seconds
from torch import Tensor

from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.ops import CONV2D, LINEAR
from nm_compiler.runtime.native.packing import Packed
from nm_compiler.runtime.native.packing import pack as pack_anywhere
from nm_compiler.runtime.native.pages import granted, mapping, tensor_in


def random_weight(shape: tuple[int, ...], pattern: Pattern) -> Tensor:
    """Normal, with a random combination kept of every group along axis 1."""
    weight = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
    grouped = torch.rand(shape).movedim(1, -1).unflatten(-1, (-1, pattern.m))
    kept = grouped.argsort(-1).argsort(-1) < pattern.n
    masked: Tensor = weight * kept.flatten(-2).movedim(-1, 1)
    return masked


def pack(weight: Tensor, pattern: Pattern, dtype: torch.dtype = torch.float32) -> Packed:
    """Packed, and in memory as a lowered graph has it."""
    return lying_as_lowered(pack_anywhere(weight, pattern, dtype=dtype))


def lying_as_lowered(packed: Packed) -> Packed:
    """A copy in huge pages, where there are any."""
    parts = {name: getattr(packed, name) for name in ("values", "codes", "scales")}
    copied: dict[str, Any] = {name: _copied(part) for name, part in parts.items() if part is not None}
    return replace(packed, **copied)


def _copied(part: Tensor) -> Tensor:
    return tensor_in(*mapping(part.nbytes), part).copy_(part) if granted() else part.clone()


def linear(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Callable[[], Tensor]:
    """The packed product with ``x``."""
    pattern, rows = [packed.pattern.n, packed.pattern.m], packed.shape[0]
    return lambda: LINEAR(x, packed.values, packed.codes, packed.scales, bias, None, pattern, rows, "")


def convolution(packed: Packed, x: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """The packed convolution, padded to keep its size."""
    pattern, kernel = [packed.pattern.n, packed.pattern.m], list(packed.shape[2:])
    padding, ones = [size // 2 for size in kernel], [1, 1]
    parts = (packed.values, packed.codes, packed.scales, bias, None, pattern, packed.shape[0])
    return lambda: CONV2D(x, *parts, kernel, ones, padding, ones, 1, "")


LEAST = 2e-2
"""Seconds that a measurement takes at least: shorter work is repeated. The garbage collector that runs between measurements
throws data out of the caches, so that the first call is slower: one of many here."""


def medians(work: Mapping[str, Callable[[], object]], repeats: int, least: float = LEAST) -> dict[str, float]:
    """Seconds a call, the median of interleaved measurements; each repeats its call for ``least`` seconds."""
    calls = {name: max(1, round(least / min(seconds(each), seconds(each)))) for name, each in work.items()}
    many = {name: partial(_repeat, each, calls[name]) for name, each in work.items()}
    return {name: spread.median / calls[name] for name, spread in interleaved(many, repeats=repeats, warmup=1).items()}


def _repeat(work: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        work()
