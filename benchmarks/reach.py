"""What is measured of one model of the zoo: can it be captured, which weights, how far permutation reaches, the law."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from workers import Row
from zoo import Entry, seeded

import nm_compiler as nm
from nm_compiler.axes.analyse import analyse
from nm_compiler.capture.export import capture, in_mode
from nm_compiler.capture.exported import Exported
from nm_compiler.capture.signature import Signature
from nm_compiler.graph import reads
from nm_compiler.law import permutation_law
from nm_compiler.pattern import PatternMap
from nm_compiler.sites.ends import ends
from nm_compiler.sites.plan import find
from nm_compiler.sites.uses import Use, constants, layouts, uses

Captured = dict[bool, tuple[GraphModule, Signature]]


def axes_row(entry: Entry, model: nn.Module, captured: Captured) -> Row:
    """Free input axes among those of all weights of products, stems left out; seconds of the analysis."""
    graphs = [gm for gm, _ in captured.values()]
    found = layouts(graphs, model)
    start = time.perf_counter()
    axes = analyse(model, list(captured.values()), layouts=found, outputs=entry.outputs)
    seconds = time.perf_counter() - start
    first = [ends(gm, constants(gm.graph))[0] for gm in graphs]
    wanted = [
        (name, layout.in_axis)
        for name, layout in found.items()
        if model.get_parameter(name).shape[layout.in_axis] > 1 and not _is_stem(graphs, first, name)
    ]
    pinned = [f"{name}[{axis}]" for name, axis in wanted if not axes.is_free(name, axis)]
    return {
        "axes_seconds": seconds, "input_axes": len(wanted), "free_input_axes": len(wanted) - len(pinned),
        "classes": len(axes), "free_classes": len(axes.free), "unknown_ops": dict(axes.unknown), "pinned_inputs": pinned,
    }  # fmt: skip


def _is_stem(graphs: Sequence[GraphModule], first: Sequence[Collection[Node]], name: str) -> bool:
    for gm, stems in zip(graphs, first, strict=True):
        fixed = constants(gm.graph)
        products = [use.node for node in reads(gm, name) for use in uses(node, fixed) if isinstance(use, Use)]
        if products:
            return all(node in stems for node in products)
    return False


def law_row(entry: Entry, undo: int) -> Row:
    """The law on the small variant: relative error after random orders, axes undone, those that nobody noticed."""
    model, args, kwargs = seeded(entry.small)
    start = time.perf_counter()
    law = permutation_law(model, args, kwargs, outputs=entry.outputs, undo=undo)
    return {
        "law_error": law.error, "law_dtype": str(law.dtype).removeprefix("torch."), "undone": law.undone,
        "undetected": list(law.undetected), "law_holds": law.holds, "law_seconds": time.perf_counter() - start,
    }  # fmt: skip


def measure(entry: Entry, *, quick: bool, capture_only: bool, undo: int) -> Iterator[Row]:
    """What is found out about one model, in parts: what is known before a crash is not lost with it."""
    start = time.perf_counter()
    model, args, kwargs = seeded(entry.small if quick else entry.build)
    yield {"parameters": sum(p.numel() for p in model.parameters()), "build_seconds": time.perf_counter() - start}
    start = time.perf_counter()
    try:
        captured = capture(model, args, kwargs)
    except nm.NMError as error:
        modes = _by_mode(model, args, kwargs, error)
        yield {"capture_seconds": time.perf_counter() - start, **modes}
        yield from second_way(model, args, kwargs)
        if modes["eval"] == "yes" and not capture_only:
            yield law_row(entry, undo)
        return
    taken = time.perf_counter() - start
    yield {"capture_seconds": taken, "eval": "yes", "train": "yes", "way": "export"}
    yield {"difference": difference(model, captured[False], args, kwargs)}
    try:
        plan = find(model, [gm for gm, _ in captured.values()], PatternMap.parse("2:4"))
    except nm.NMError as error:
        yield {"planned": 0, "plan_error": str(error)}
        return
    yield {"planned": len(plan.sites), "reasons": histogram([refusal.reason for refusal in plan.refusals])}
    if capture_only:
        return
    yield axes_row(entry, model, captured)
    start = time.perf_counter()
    routes = {mode: Exported(gm, signature) for mode, (gm, signature) in captured.items()}
    with mock.patch("nm_compiler.capture.preparing.take", return_value=routes):
        nm.compile(model, args, kwargs)
    yield {"compile_seconds": taken + time.perf_counter() - start}
    del captured, model
    yield law_row(entry, undo)


def second_way(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Row]:
    """What `nm.compile` does with a model that cannot be exported."""
    start = time.perf_counter()
    try:
        sparse = nm.compile(model, args, kwargs)
    except nm.NMError as error:
        yield {"compile_error": str(error)}
        return
    yield {"way": "fragments", "planned": len(sparse.plan.sites), "compile_seconds": time.perf_counter() - start}
    yield {"reasons": histogram([refusal.reason for refusal in sparse.plan.refusals])}


def difference(model: nn.Module, captured: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The largest absolute difference between the outputs of the evaluation graph and of the model."""
    gm, signature = captured
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention of eager evaluation rounds differently
    with torch.no_grad(), in_mode(model, False):
        expected = pytree.tree_leaves(model(*args, **kwargs, **signature.hidden))
        found = gm(*pytree.tree_leaves((args, {**kwargs, **signature.hidden})))
    pairs = [(f, e) for f, e in zip(pytree.tree_leaves(found), expected, strict=True) if isinstance(e, torch.Tensor)]
    return max((float((f.double() - e.double()).abs().nan_to_num(0.0).max()) for f, e in pairs if e.numel()), default=0.0)


def _by_mode(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: nm.NMError) -> Row:
    """Each mode by itself: a model that is deaf to ``train(mode)`` is captured in the mode that it is kept in."""
    found: Row = {}
    for column, mode in (("eval", False), ("train", True)):
        model.__dict__["train"] = partial(_keep_mode, model, mode)
        try:
            capture(model, args, kwargs)
            found[column] = "yes"
        except Exception as again:
            found[column] = "no"
            found[f"{column}_error"] = str(again)
        finally:
            del model.__dict__["train"]
    return {**found, "error": str(error)}


def _keep_mode(model: nn.Module, mode: bool, asked: bool = True) -> nn.Module:
    return type(model).train(model, mode)


def histogram(reasons: Sequence[str]) -> Row:
    """Reasons by how often they occur, numbers left out so that equal reasons are equal."""
    return dict(Counter("".join("#" if c.isdigit() else c for c in reason) for reason in reasons).most_common())
