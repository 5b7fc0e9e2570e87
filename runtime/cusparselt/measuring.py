"""Time a product dense and packed, at the sizes of the example, as it is lowered: with its algorithm and its copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.runtime.choose import Choices, Timing, replayed, side_by_side
from nm_compiler.runtime.cusparselt.int8 import cslt_linear_int8, pack_int8
from nm_compiler.runtime.cusparselt.op import cslt_linear
from nm_compiler.runtime.cusparselt.packing import pack
from nm_compiler.runtime.cusparselt.search import Searches
from nm_compiler.runtime.cusparselt.unfold import Geometry, matrix_of, unfold_taps


@dataclass(frozen=True, slots=True)
class Ways:
    """How products are timed. choices: what is known; searches: for their algorithms; graph: as in a CUDA graph."""

    choices: Choices
    searches: Searches | None
    graph: bool


@dataclass(frozen=True, slots=True)
class Case:
    """A product. weight: dense, on the device; sizes: of the input; geometry: of a convolution that is no plain 1x1."""

    weight: Tensor
    sizes: tuple[int, ...]
    bias: bool
    channels_last: bool
    geometry: Geometry | None


def measure(case: Case, ways: Ways) -> Timing:
    """In the weight's dtype. The device is waited for."""
    weight, out, at = case.weight, case.weight.shape[0], case.geometry or Geometry()
    form = torch.channels_last if case.channels_last else torch.contiguous_format
    x, added = _operands(case)
    if weight.ndim == 4 and case.channels_last:
        x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
    packed, uneven = pack(weight), at.sides[0] != at.sides[1] or at.sides[2] != at.sides[3]

    def pixels() -> Tensor:
        if weight.ndim == 2:
            return x
        return x.movedim(-3, -1) if at.plain else unfold_taps(x, *map(list, (at.taps, at.stride, at.sides, at.dilation)))

    def sparse() -> Tensor:
        read = pixels()
        rows = read.reshape(-1, read.shape[-1])
        result: Tensor = cslt_linear(rows, packed, added, out, rows.shape[1], algorithm, algorithm > 0)
        if weight.ndim == 2:
            return result.contiguous()
        return result.reshape(*read.shape[:-1], out).movedim(-1, -3).contiguous(memory_format=form)

    def dense() -> Tensor:
        if weight.ndim == 2:
            return functional.linear(x, weight, added)
        given = functional.pad(x, at.sides) if uneven else x
        return functional.conv2d(given, weight, added, at.stride, (0, 0) if uneven else at.sides[2::-2], at.dilation)

    with torch.no_grad():
        read = pixels()
        rows = read.reshape(-1, read.shape[-1])
        algorithm = 0 if ways.searches is None else ways.searches(matrix_of(weight), packed, rows, added)
        return _timed(dense, sparse, weight.device, ways.graph)


def measure_int8(case: Case, ways: Ways) -> Timing:
    """The linear in the weight's dtype and in 8 bits, rounding of the input included."""
    x, added = _operands(case)
    packed, scale = pack_int8(case.weight)

    def rounded() -> Tensor:
        result: Tensor = cslt_linear_int8(x, packed, scale, added, case.sizes[-1], False)
        return result.contiguous()

    with torch.no_grad():
        return _timed(partial(functional.linear, x, case.weight, added), rounded, case.weight.device, ways.graph)


def _operands(case: Case) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(case.sizes, device=case.weight.device).to(case.weight.dtype)
    return x, case.weight.new_zeros(case.weight.shape[0]) if case.bias else None


def _timed(dense: Callable[[], object], sparse: Callable[[], object], device: torch.device, graph: bool) -> Timing:
    if graph and device.type == "cuda":
        dense, sparse = replayed(dense), replayed(sparse)
    return side_by_side(dense, sparse, device)
