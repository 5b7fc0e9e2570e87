"""Put the casts of ``with torch.autocast`` in a model's forward() into the graph, where every pass and runtime sees them.

    before                                                     after
    %y = autocast("cpu", bf16, True, None, %body, %x)          %c = aten._to_copy(%x, dtype=bf16)
    body:  %w = self.fc.weight      # f32                      %w = self.fc.weight
           %y = aten.linear(%x, %w) # bf16                     %k = aten._to_copy(%w, dtype=bf16)
                                                               %y = aten.linear(%c, %k)

For planning, permuting, calibrating and inference, outside of any other autocast: a graph that trains keeps its regions, since
``enabled=False`` has to hold under the caller's autocast.

Safe because what is cast is not told by lists of ops: every op is run under autocast on its fake inputs, and what torch casts
there is cast here. An op that is told a dtype instead gets its inputs in it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nm_compiler.capture.binding import bind
from nm_compiler.capture.bodies import autocast, is_body
from nm_compiler.graph import Copies, fake_mode_of, getattr_path, inline, tidy, unhooked

aten = torch.ops.aten


def spell_out_autocast(gm: GraphModule) -> GraphModule:
    """A graph over the same model without regions of autocast; ``gm`` itself, which stays as it is, if it has none."""
    if not gm.graph.find_nodes(op="call_function", target=autocast):
        return gm
    graph, extras = Graph(), dict[str, Any]()
    given = [graph.node_copy(node) for node in gm.graph.find_nodes(op="placeholder")]
    graph.output(_inline(graph, gm, given, extras, fake_mode_of(gm.graph), None))
    flat = bind(graph, gm, extras)
    tidy(flat)
    return flat


def _inline(
    graph: Graph, gm: GraphModule, given: Sequence[Any], extras: dict[str, Any], mode: Any, region: Sequence[Any] | None
) -> Any:
    """Append the nodes of ``gm``, which lies in ``region``: what autocast was told. Returns what it returns, in new nodes."""

    def copy(node: Node, copies: Copies) -> Any:
        if node.op == "get_attr":
            value = getattr_path(gm, node.target)
            return None if is_body(value) else _read(graph, node, value, gm.__dict__["extras"], extras)
        if node.target is autocast:
            args: Any = node.args
            *told, body = args[:5]
            inputs = torch.fx.map_arg(args[5:], copies.__getitem__)
            return _inline(graph, getattr_path(gm, body.target), inputs, extras, mode, told)
        if _item_of(node) in copies and not isinstance(copies[_item_of(node)], Node):
            return copies[_item_of(node)][node.args[1]]
        if region is None or not isinstance(node.target, torch._ops.OpOverload):
            return graph.node_copy(node, copies.__getitem__)
        return _cast(graph, node, copies, mode, region)

    return inline(gm, given, copy)


def _item_of(node: Node) -> Any:
    return node.args[0] if node.target is operator.getitem else None


def _read(graph: Graph, node: Node, value: Any, held: Mapping[str, Any], extras: dict[str, Any]) -> Node:
    """Read state under its name, and a constant of a body under one that is free."""
    new = graph.node_copy(node)
    if node.target in held:
        while extras.setdefault(str(new.target), value) is not value:
            new.target = f"{new.target}_"
    return new


def _cast(graph: Graph, node: Node, copies: Copies, mode: Any, region: Sequence[Any]) -> Node:
    """A copy of ``node`` whose inputs are cast as autocast would cast them."""
    device, dtype, enabled, _ = region
    new = graph.node_copy(node, copies.__getitem__)
    if not enabled or getattr(node.target, "_opname", "") in ("to", "_to_copy"):
        return new
    with mode, unhooked(), torch.no_grad(), enable_python_dispatcher():
        with torch.autocast(device, dtype=dtype, cache_enabled=False), _Casts() as casts:
            wanted = _run(new)
        _cast_inputs(graph, new, lambda value: casts.dtypes.get(id(value)))
        found = _run(new)
        if _dtypes(found) != _dtypes(wanted):  # autocast has told the op a dtype
            width = next(iter(_dtypes(wanted)))
            _cast_inputs(graph, new, lambda value: width if value.is_floating_point() and value.dtype != width else None)
    return new


def _cast_inputs(graph: Graph, node: Node, dtype_of: Callable[[Tensor], torch.dtype | None]) -> None:
    for each in node.all_input_nodes:
        value = each.meta["val"]
        dtype = dtype_of(value) if isinstance(value, Tensor) else None
        if dtype is not None and dtype != value.dtype:
            with graph.inserting_before(node):
                cast = graph.call_function(aten._to_copy.default, (each,), {"dtype": dtype})
            cast.meta["val"] = value.to(dtype)
            node.replace_input_with(each, cast)


def _run(node: Node) -> Any:
    args, kwargs = pytree.tree_map_only(Node, lambda each: each.meta["val"], (node.args, node.kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _dtypes(values: Any) -> tuple[torch.dtype, ...]:
    return tuple(value.dtype for value in pytree.tree_leaves(values) if isinstance(value, Tensor))


class _Casts(TorchDispatchMode):
    """Notes which tensors are cast to which dtype, by ``id``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._to_copy.default and (dtype := (kwargs or {}).get("dtype")) is not None:
            self.dtypes[id(args[0])] = dtype
        return func(*args, **(kwargs or {}))
