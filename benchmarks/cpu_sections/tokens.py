"""Few tokens, every weight cold: copies that are larger than the caches together are read in turn, as in generating text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from cpu_sections.weights import linear, lying_as_lowered, medians, pack, random_weight
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.library import Library

SHAPES = [(768, 768), (768, 3072), (4096, 4096), (4096, 11008)]
COLD = 256 * 2**20
"""Bytes that the copies of a weight have together at least."""


def tokens(pattern: Pattern, count: int, library: Library, *, repeats: int) -> list[dict[str, Any]]:
    """Float32, bfloat16 and int8 values against F.linear in float32 and in bfloat16, and what one thread reads between them.

    Data are bfloat16 where values are, as in a model of bfloat16, and else float32.

    "of reading": bytes a second of the packed product over those of a plain read of as many bytes, as cold, in huge pages.
    """
    rows = []
    for width, out in SHAPES:
        weight, x = random_weight((out, width), pattern), torch.randn(count, width)
        half, half_x = weight.bfloat16(), x.bfloat16()
        work: dict[str, Callable[[], object]] = {
            "dense": _in_turn([_dense(x, copy) for copy in _copies(weight)]),
            "dense bf16": _in_turn([_dense(half_x, copy) for copy in _copies(half)]),
        }
        sizes = {"dense": weight.nbytes, "dense bf16": half.nbytes}
        for name, dtype in (("packed", torch.float32), ("packed bf16", torch.bfloat16), ("packed int8", torch.int8)):
            packed = pack(weight, pattern, dtype=dtype)
            many = max(2, COLD // packed.nbytes)
            copies = [lying_as_lowered(packed) for _ in range(many)]
            data = half_x if dtype == torch.bfloat16 else x
            work[name], sizes[name] = _in_turn([linear(copy, data) for copy in copies]), packed.nbytes
            if dtype == torch.float32:
                others = [lying_as_lowered(packed).values for _ in range(many)]  # what a product just read would not be cold
                work["read"], sizes["read"] = (
                    _in_turn([partial(library.read_all, other) for other in others]),
                    others[0].nbytes,
                )
        times = medians(work, repeats)
        gbytes = {key: sizes[key] / value / 1e9 for key, value in times.items()}
        rows.append({
            "layer": f"{count} x {width} to {out}",
            "us": {key: value * 1e6 for key, value in times.items()},
            "gbytes": gbytes,
            "of reading": gbytes["packed"] / gbytes["read"],
            "share": sizes["packed"] / sizes["dense"],
            "speedup": times["dense"] / times["packed"],
            "bf16 over bf16": times["dense bf16"] / times["packed bf16"],
            "int8 over float32": times["dense"] / times["packed int8"],
        })  # fmt: skip
    return rows


def _dense(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    return lambda: functional.linear(x, weight)


def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
    return [weight.clone() for _ in range(max(2, COLD // weight.nbytes))]


def _in_turn(work: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call runs the next one."""
    turn = itertools.cycle(work)
    return lambda: next(turn)()
