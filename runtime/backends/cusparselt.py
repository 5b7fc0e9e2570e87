"""Sparse products of NVIDIA GPUs inside PyTorch, through the cuSPARSELt that torch ships with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nm_compiler.graph import arguments_of, getattr_path, run, standalone
from nm_compiler.passes.lower_cusparselt import lower_cusparselt
from nm_compiler.passes.lower_int8 import lower_int8
from nm_compiler.pattern import matches
from nm_compiler.runtime.backends.base import Backend, Job, Result
from nm_compiler.runtime.choose import Choices, Timing, key_of
from nm_compiler.runtime.cusparselt import measuring
from nm_compiler.runtime.cusparselt.candidates import Candidate, candidates
from nm_compiler.runtime.cusparselt.direct import binding
from nm_compiler.runtime.cusparselt.eligible import MIN_TOKENS, int8_reasons, machine_of, of_machine
from nm_compiler.runtime.cusparselt.int8 import PACKED_SHARE as INT8_SHARE
from nm_compiler.runtime.cusparselt.measuring import Case, Ways
from nm_compiler.runtime.cusparselt.packing import PACKED_SHARE
from nm_compiler.runtime.cusparselt.search import SEEN, Searches
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.products import Decision, Product
from nm_compiler.wording import dtype_name

KERNEL = "cuSPARSELt"
ROUGH = 0.25  # what 8 bits with one scale for all inputs may do to an output without being a fault


class CuSPARSELt(Backend):
    """Options: search, True or False to look for a faster algorithm of every product, or of none, instead of large ones only;
    graph, True to time as in a CUDA graph; min_tokens, fewer stay dense where nothing is measured; choose, False to lower
    without measuring (then nothing is searched unasked, and convolutions that need a copy stay dense); cache, another file for
    what was measured; int8, globs of weights whose linears are computed in 8 bits, inputs rounded too (never by default).

    By default every distinct product is timed sparse and dense on the device, as Python launches them, and the faster stays.
    """

    name = "cusparselt"

    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        why = next(iter(of_machine(machine_of(device))), None)
        if why is None and dtype not in (torch.float16, torch.bfloat16):
            why = f"no sparse product is built for {dtype_name(dtype)}: say dtype=torch.bfloat16 (or float16)"
        return why

    def lower(self, job: Job) -> Result:
        options = self.take(job, "search", "graph", "min_tokens", "choose", "cache", "int8")
        found = job.products
        sites = {each.read: each.site for each in found}
        measuring = bool(options.get("choose", True))
        least = int(options.get("min_tokens", 0 if measuring else MIN_TOKENS))
        judged = candidates(job.gm, sites, min_tokens=least, unfold=measuring)
        by_node = {each.node.name: each for each in judged}
        searches = _searches(options.get("search"), measuring)
        ways = Ways(Choices(options.get("cache")), searches, bool(options.get("graph", False))) if measuring else None
        rounded, notes = _rounded(judged, options.get("int8", ()))
        decisions = {each.node: self._decide(job, each, by_node[each.node], ways, each.node in rounded) for each in found}
        chosen = {name for name, decision in decisions.items() if decision.kernel}
        lower = partial(
            lower_cusparselt,
            sites_by_read=sites,
            choose=lambda node: node.name in chosen,
            search=searches or False,
            min_tokens=0,
            unfold=True,
        )
        eight = partial(lower_int8, found=judged, choose=lambda node: node.name in chosen & rounded)
        made = standalone(run(job.gm, [eight, lower] if rounded else [lower]))
        return Result(made, decisions, found, notes, rough=ROUGH if chosen & rounded else 0.0)

    def _decide(self, job: Job, product: Product, candidate: Candidate, ways: Ways | None, eight: bool = False) -> Decision:
        if candidate.reasons:
            first = candidate.reasons[0]
            return Decision(reasons=candidate.reasons, hint=first.partition(": ")[2])
        geometry = candidate.product.geometry
        kernel = KERNEL if geometry is None or geometry.plain else f"{KERNEL}, unfolded"
        packed = Decision(kernel, eligible=True, bytes=round(PACKED_SHARE * _bytes(job, product)))
        if eight:
            size = round(INT8_SHARE * _bytes(job, product) / product.dtype.itemsize)
            packed = Decision(f"{KERNEL}, int8", eligible=True, bytes=size)
        if ways is None or matches(product.site.name, job.force) is not None:
            return packed
        timing = _timed(job, product, candidate, ways, eight)
        timed = replace(packed, dense_s=timing.dense_s, sparse_s=timing.sparse_s)
        if timing.sparse_wins:
            return timed
        tokens = candidate.product.tokens
        why = f"measured {timing.speedup:.2f}x of dense at {tokens} tokens"
        hint = "more tokens a call, or force=[...]"
        if not ways.graph:
            hint = "options={'graph': True} if it runs in a CUDA graph, more tokens a call, or force=[...]"
        return replace(timed, kernel="", reasons=(why,), bytes=None, hint=hint)


def _searches(wish: bool | None, measuring: bool) -> Searches | None:
    if wish is None:
        return Searches(SEEN) if measuring else None
    return Searches() if wish else None


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


def _timed(job: Job, product: Product, candidate: Candidate, ways: Ways, eight: bool) -> Timing:
    weight = getattr_path(job.gm, product.read).detach()
    given: Any = candidate.node.args[0].meta["val"]  # type: ignore[union-attr]
    bias = arguments_of(candidate.node)["bias"] is not None
    geometry = None if (at := candidate.product.geometry) is None or at.plain else at
    case = Case(weight, tuple(job.sizes(given)), bias, lies_in_channels_last(given), geometry)
    facts = {"weight": tuple(weight.shape), "input": case.sizes, "channels_last": case.channels_last, "bias": bias,
             "dtype": weight.dtype}  # fmt: skip
    if geometry is not None:
        facts["geometry"] = geometry
    if binding(weight.device) is not None:  # what was measured with torch's call says nothing of it
        facts["direct"] = True
    if ways.graph:
        facts["graph"] = True
    if eight:
        facts["int8"] = True
    elif ways.searches is not None:
        facts["searched from"] = ways.searches.least
    measure = measuring.measure_int8 if eight else measuring.measure
    return ways.choices.find(key_of(weight.device, kernel=KERNEL, **facts), partial(measure, case, ways))


def _bytes(job: Job, product: Product) -> int:
    return int(getattr_path(job.gm, product.read).nbytes)
