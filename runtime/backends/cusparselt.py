"""Sparse products of NVIDIA GPUs inside PyTorch, through the cuSPARSELt that torch ships with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from nm_compiler.graph import getattr_path, run, standalone
from nm_compiler.passes.lower_cusparselt import lower_cusparselt
from nm_compiler.passes.lower_int8 import lower_int8
from nm_compiler.pattern import matches
from nm_compiler.runtime.backends.base import Backend, Job, Result
from nm_compiler.runtime.choose import Choices, Timing, key_of, side_by_side
from nm_compiler.runtime.cusparselt.candidates import Candidate, candidates
from nm_compiler.runtime.cusparselt.direct import binding
from nm_compiler.runtime.cusparselt.eligible import MIN_TOKENS, int8_reasons, machine_of, of_machine
from nm_compiler.runtime.cusparselt.int8 import PACKED_SHARE as INT8_SHARE
from nm_compiler.runtime.cusparselt.int8 import cslt_linear_int8, pack_int8
from nm_compiler.runtime.cusparselt.op import cslt_linear
from nm_compiler.runtime.cusparselt.packing import PACKED_SHARE, pack
from nm_compiler.runtime.cusparselt.unfold import Geometry, unfold_taps
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.products import Decision, Product

KERNEL = "cuSPARSELt"
ROUGH = 0.25  # what 8 bits with one scale for all inputs may do to an output without being a fault


class CuSPARSELt(Backend):
    """Options: search, let the library look for a faster algorithm; min_tokens, fewer stay dense where nothing is measured;
    choose, False to lower without measuring (then convolutions that need a copy stay dense); cache, another file for what was
    measured; int8, globs of weights whose linears are computed in 8 bits, inputs rounded too (never by default).

    By default every distinct product is timed sparse and dense on the device, as Python launches them, and the faster stays.
    """

    name = "cusparselt"

    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        why = next(iter(of_machine(machine_of(device))), None)
        if why is None and dtype not in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            why = f"no sparse product is built for {name}: say dtype=torch.bfloat16 (or float16)"
        return why

    def lower(self, job: Job) -> Result:
        options = self.take(job, "search", "min_tokens", "choose", "cache", "int8")
        found = job.products
        sites = {each.read: each.site for each in found}
        measuring = bool(options.get("choose", True))
        least = int(options.get("min_tokens", 0 if measuring else MIN_TOKENS))
        judged = candidates(job.gm, sites, min_tokens=least, unfold=measuring)
        by_node = {each.node.name: each for each in judged}
        choices = Choices(options.get("cache")) if measuring else None
        rounded, notes = _rounded(judged, options.get("int8", ()))
        decisions = {each.node: self._decide(job, each, by_node[each.node], choices, each.node in rounded) for each in found}
        chosen = {name for name, decision in decisions.items() if decision.kernel}
        lower = partial(
            lower_cusparselt,
            sites_by_read=sites,
            choose=lambda node: node.name in chosen,
            search=bool(options.get("search", False)),
            min_tokens=0,
            unfold=True,
        )
        eight = partial(lower_int8, found=judged, choose=lambda node: node.name in chosen & rounded)
        made = standalone(run(job.gm, [eight, lower] if rounded else [lower]))
        return Result(made, decisions, found, notes, rough=ROUGH if chosen & rounded else 0.0)

    def _decide(
        self, job: Job, product: Product, candidate: Candidate, choices: Choices | None, eight: bool = False
    ) -> Decision:
        if candidate.reasons:
            first = candidate.reasons[0]
            return Decision(reasons=candidate.reasons, hint=first.partition(": ")[2])
        geometry = candidate.product.geometry
        kernel = KERNEL if geometry is None or geometry.plain else f"{KERNEL}, unfolded"
        packed = Decision(kernel, eligible=True, bytes=round(PACKED_SHARE * _bytes(job, product)))
        if eight:
            size = round(INT8_SHARE * _bytes(job, product) / product.dtype.itemsize)
            packed = Decision(f"{KERNEL}, int8", eligible=True, bytes=size)
        if choices is None or matches(product.site.name, job.force) is not None:
            return packed
        timing = _timed(job, product, candidate, choices, eight)
        timed = replace(packed, dense_s=timing.dense_s, sparse_s=timing.sparse_s)
        if timing.sparse_wins:
            return timed
        tokens = candidate.product.tokens
        why = f"measured {timing.speedup:.2f}x of dense at {tokens} tokens"
        return replace(timed, kernel="", reasons=(why,), bytes=None, hint="more tokens a call, or force=[...]")


def _rounded(judged: Sequence[Candidate], globs: str | Sequence[str]) -> tuple[set[str], tuple[str, ...]]:
    """The nodes to compute in 8 bits, and a note for each that was asked for and cannot be."""
    wanted = (globs,) if isinstance(globs, str) else tuple(globs)
    nodes, notes = set[str](), []
    for each in judged:
        if each.reasons or matches(each.site.name, wanted) is None:
            continue
        why = int8_reasons(each.product)
        if why:
            notes.append(f"int8: {each.site.name}: {why[0]}")
        elif each.node.args[0].meta["val"].ndim == 2:  # type: ignore[union-attr]
            nodes.add(each.node.name)
    return nodes, tuple(notes)


def _timed(job: Job, product: Product, candidate: Candidate, choices: Choices, eight: bool) -> Timing:
    weight = getattr_path(job.gm, product.read).detach()
    arguments: tuple[Any, ...] = candidate.node.args
    sizes = tuple(job.sizes(arguments[0].meta["val"]))
    bias = len(arguments) > 2 and isinstance(arguments[2], Node)
    last = lies_in_channels_last(arguments[0].meta["val"])
    facts = {"weight": tuple(weight.shape), "input": sizes, "channels_last": last, "bias": bias, "dtype": weight.dtype}
    geometry = candidate.product.geometry
    if geometry is not None and not geometry.plain:
        facts["geometry"] = geometry
    if binding(weight.device) is not None:  # what was measured with torch's call says nothing of it
        facts["direct"] = True
    if eight:
        facts["int8"] = True
        return choices.find(key_of(weight.device, kernel=KERNEL, **facts), partial(_measure_int8, weight, sizes, bias))
    return choices.find(key_of(weight.device, kernel=KERNEL, **facts), partial(_measure, weight, sizes, bias, last, geometry))


def _measure(
    weight: Tensor, sizes: tuple[int, ...], bias: bool, channels_last: bool, geometry: Geometry | None = None
) -> Timing:
    """The product both ways at the sizes of the example; the sparse one with the copies that it may need."""
    x = torch.randn(sizes, device=weight.device).to(weight.dtype)
    added = weight.new_zeros(weight.shape[0]) if bias else None
    packed, out = pack(weight), weight.shape[0]

    def linear() -> Tensor:
        result: Tensor = cslt_linear(x.reshape(-1, sizes[-1]), packed, added, out, sizes[-1], 0, False)
        return result.contiguous()

    def convolved() -> Tensor:
        pixels = x.movedim(-3, -1) if plain else unfold_taps(x, *map(list, (at.taps, at.stride, at.sides, at.dilation)))
        read = pixels.shape[-1]
        result: Tensor = cslt_linear(pixels.reshape(-1, read), packed, added, out, read, 0, False)
        return result.reshape(*pixels.shape[:-1], out).movedim(-1, -3).contiguous(memory_format=form)

    def dense() -> Tensor:
        if geometry is None:
            return functional.linear(x, weight, added)
        given = functional.pad(x, at.sides) if uneven else x
        return functional.conv2d(given, weight, added, at.stride, (0, 0) if uneven else at.sides[2::-2], at.dilation)

    at = geometry or Geometry()
    plain, uneven = at.plain, at.sides[0] != at.sides[1] or at.sides[2] != at.sides[3]
    form = torch.channels_last if channels_last else torch.contiguous_format
    if weight.ndim == 4 and channels_last:
        x = x.contiguous(memory_format=form)
        weight = weight.contiguous(memory_format=form)
    with torch.no_grad():
        return side_by_side(dense, convolved if weight.ndim == 4 else linear, weight.device)


def _measure_int8(weight: Tensor, sizes: tuple[int, ...], bias: bool) -> Timing:
    """The linear in the weight's dtype and in 8 bits, rounding of the input included."""
    x = torch.randn(sizes, device=weight.device).to(weight.dtype)
    added = weight.new_zeros(weight.shape[0]) if bias else None
    packed, scale = pack_int8(weight)

    def rounded() -> Tensor:
        result: Tensor = cslt_linear_int8(x, packed, scale, added, sizes[-1], False)
        return result.contiguous()

    with torch.no_grad():
        return side_by_side(partial(functional.linear, x, weight, added), rounded, weight.device)


def _bytes(job: Job, product: Product) -> int:
    return int(getattr_path(job.gm, product.read).nbytes)
