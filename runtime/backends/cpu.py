"""Packed N:M kernels on the CPU, inside PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.errors import NMError
from nm_compiler.evaluate import value_of
from nm_compiler.graph import Pass, arguments_of, getattr_path, run, standalone
from nm_compiler.memory import give_back, keep_freed
from nm_compiler.passes.channels_last import channels_last
from nm_compiler.passes.fuse_dense import fuse_dense
from nm_compiler.passes.fuse_epilogues import fuse_epilogues
from nm_compiler.passes.left_products import left_products
from nm_compiler.passes.lower_cpu import lower_cpu, parts_of
from nm_compiler.passes.pool_channels_last import pool_channels_last
from nm_compiler.passes.turned_linears import turned_linears
from nm_compiler.passes.unflatten_tokens import unflatten_tokens
from nm_compiler.pattern import matches
from nm_compiler.runtime.backends.base import Backend, Job, Result
from nm_compiler.runtime.choose import Choices, Timing, key_of
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.native.eligible import DTYPES, geometry, reasons, volume_of
from nm_compiler.runtime.native.library import digest, load
from nm_compiler.runtime.native.measuring import timed
from nm_compiler.runtime.native.packing import pack, packed_bytes
from nm_compiler.runtime.native.pages import huge_pages
from nm_compiler.runtime.native.whole import Whole, compared
from nm_compiler.runtime.products import Decision, Product
from nm_compiler.scaled import value_if_scaled
from nm_compiler.wording import dtype_name

VALUES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ROUGH: Mapping[torch.dtype | None, float] = {torch.bfloat16: 2e-2, torch.int8: 1e-1}
"""How far outputs may be from the model's where values are rounded."""


class Cpu(Backend):
    """Options: values, "bfloat16" or "int8" to store rounded weights (float32 sums); choose, False to lower without measuring;
    cache, another file for what was measured; against, "inductor" to time against what torch.compile makes of it as well.

    By default every distinct product is timed against eager torch's best way, then the whole graph, and the faster stays.
    """

    name = "cpu"
    later = True
    any_pattern = True

    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the model is on {device}: model.cpu()"
        if dtype not in DTYPES:
            return f"{dtype_name(dtype)}, and the CPU kernels take float32 and bfloat16: say dtype=torch.float32"
        found = load()
        return found if isinstance(found, str) else None

    def lower(self, job: Job) -> Result:
        wish = _wish(self.take(job, "values", "choose", "cache", "against"))
        found, nodes = job.products, {node.name: node for node in job.gm.graph.nodes}
        keep_freed()
        decisions = {each.node: _decide(job, each, nodes[each.node], wish) for each in found}
        chosen = [each for each in found if decisions[each.node].kernel]
        measured = chosen and all(decisions[each.node].dense_s is not None for each in chosen)  # none is forced
        dense = _dense(job.gm) if measured else None
        ways = _ways(job.gm, partial(lower_cpu, chosen=chosen, values=wish.values), both=dense is not None)
        give_back()
        library, threads = load(), torch.get_num_threads()
        notes = [f"CPU kernels for {getattr(library, 'isa', library)}, {threads} thread{'s' * (threads > 1)}."]
        made = ways["packed"]
        if dense is not None:
            whole = compared(dense, ways, job.flat, inductor=wish.inductor)
            notes.append(str(whole))
            made = ways[whole.best]
            if not whole.packed_wins:
                made, decisions = dense, {name: _undone(each, whole) for name, each in decisions.items()}
        return Result(made, decisions, found, tuple(notes), rough=ROUGH.get(wish.values, 0.0))


@dataclass(frozen=True)
class Wish:
    """The options. values: dtype of packed values, by default that of each weight; choices: timings, None to take none."""

    values: torch.dtype | None = None
    choices: Choices | None = None
    inductor: bool = False


def _wish(options: Mapping[str, Any]) -> Wish:
    """Raises NMError for an option of another value than there is."""
    values, against = options.get("values"), options.get("against", "eager")
    if values is not None and values not in VALUES:
        raise NMError(f"options={{'values': {values!r}}}: choose one of {', '.join(VALUES)}")
    if against not in ("eager", "inductor"):
        raise NMError(f"options={{'against': {against!r}}}: choose eager or inductor")
    choices = Choices(options.get("cache")) if options.get("choose", True) else None
    return Wish(None if values is None else VALUES[values], choices, against == "inductor")


def _ways(gm: GraphModule, lower: Pass, *, both: bool) -> dict[str, GraphModule]:
    """The packed graph, by its name in notes, and if ``both`` and there are images in rows, one with channels innermost."""
    gm = run(gm, [lower, left_products, unflatten_tokens, turned_linears, fuse_epilogues, huge_pages])
    turned = channels_last(gm) if both else gm
    last = {} if turned is gm else {"packed, channels last": standalone(run(turned, [fuse_dense]))}
    return {"packed": standalone(run(gm, [pool_channels_last, fuse_dense])), **last}


def _dense(gm: GraphModule) -> GraphModule:
    """The graph as it came, to compare with and to stay with."""
    return standalone(run(GraphModule(gm, copy.deepcopy(gm.graph)), [left_products, unflatten_tokens]))


def _undone(decision: Decision, whole: Whole) -> Decision:
    """A product that won by itself, in a graph that lost."""
    if not decision.kernel:
        return decision
    reason, hint = f"measured {whole.speedup:.2f}x of dense in the whole graph", 'force=[...], or options={"choose": False}'
    return replace(decision, kernel="", bytes=None, reasons=(reason,), hint=hint)


def _decide(job: Job, product: Product, node: Node, wish: Wish) -> Decision:
    why = reasons(product, node)
    if why:
        return Decision(reasons=why, hint=why[0].partition(": ")[2])
    weight: Tensor = getattr_path(job.gm, product.read).detach()
    site, dtype = product.site, wish.values or weight.dtype
    name = f"CPU packed {site.pattern}" + ("" if dtype == torch.float32 else f" {dtype_name(dtype)}")
    decision = Decision(name, eligible=True, bytes=packed_bytes(tuple(weight.shape), site.pattern, site.conv_groups, dtype))
    if wish.choices is None or matches(site.name, job.force) is not None:
        return decision
    data: Any = node.args[0]
    x = _example(job, data, weight.dtype)
    timing = wish.choices.find(*_measurement(job, product, node, weight, x, name, wish))
    give_back()
    decision = replace(decision, dense_s=timing.dense_s, sparse_s=timing.sparse_s)
    if timing.sparse_wins:
        return decision
    size = f"{x.numel() // max(x.shape[-1], 1)} tokens" if site.op == "linear" else f"inputs of {list(x.shape)}"
    return replace(
        decision, kernel="", bytes=None, reasons=(f"measured {timing.speedup:.2f}x of dense at {size}",),
        hint="fewer kept weights (1:4, 1:8), a larger layer, or force=[...]",
    )  # fmt: skip


def _measurement(
    job: Job, product: Product, node: Node, weight: Tensor, x: Tensor, kernel: str, wish: Wish
) -> tuple[str, Callable[[], Timing]]:
    """What it is known under, and how it is taken. The weight is computed and packed only if it is."""
    given = arguments_of(node)["bias"]
    bias = None if given is None else value_of(job.gm, given).detach()
    conv = None if product.site.op == "linear" else geometry(node) or volume_of(node)
    key = key_of(
        weight.device, kernel=kernel, weight=tuple(weight.shape), input=tuple(x.shape), strides=x.stride(), conv=conv,
        bias=bias is not None, dtype=weight.dtype, isa=getattr(load(), "isa", ""), kernels=digest(),
        inductor=wish.inductor,
    )  # fmt: skip

    def measure() -> Timing:
        value = value_if_scaled(weight)
        site, dtype = product.site, wish.values or weight.dtype
        parts = parts_of(value, volume_of(node)) if conv is not None else [value]
        packed = [pack(part, site.pattern, conv_groups=site.conv_groups, dtype=dtype) for part in parts]
        return timed(value, packed, x, bias, conv, inductor=wish.inductor)

    return key, measure


def _example(job: Job, data: Node, dtype: torch.dtype) -> Tensor:
    """Random data as the product gets them in the example, in their layout."""
    value = data.meta["val"]
    x = torch.randn(job.sizes(value), device="cpu").to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if lies_in_channels_last(value) else x
