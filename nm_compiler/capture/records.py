"""A graph as plain values that pickle, and back. (fx graphs hold op objects, which do not pickle.)

Also: devices that were frozen into a graph at capture follow the model when it moves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from nm_compiler.capture.binding import bind
from nm_compiler.capture.bodies import autocast, is_body
from nm_compiler.graph import type_of


class _Ref:
    """Stands for a node in packed arguments."""

    def __init__(self, name: str) -> None:
        self.name = name


def pack(gm: GraphModule) -> dict[str, Any]:
    """Nodes as tuples, constants as they are, subgraphs packed in turn; types are kept as text for `show`."""
    symbols: dict[str, str] = {}
    nodes = []
    for node in gm.graph.nodes:
        args, kwargs = map_aggregate((node.args, node.kwargs), _as_ref)
        kind = node.meta.get("type") or type_of(node.meta.get("val"), symbols) if node.op != "output" else ""
        nodes.append((node.op, node.name, _pack_target(node.target), args, kwargs, kind))
    extras = {}
    own = gm.__dict__["extras"] if "extras" in gm.__dict__ else _attributes(gm)
    for name, value in own.items():
        kind = "body" if is_body(value) else "graph" if isinstance(value, GraphModule) else "value"
        extras[name] = (kind, value if kind == "value" else pack(value))
    return {"nodes": nodes, "extras": extras}


def _as_ref(value: Any) -> Any:
    return _Ref(value.name) if isinstance(value, Node) else value


def unpack(packed: dict[str, Any], model: nn.Module) -> GraphModule:
    """The inverse of `pack`: the graph, bound to ``model``."""
    graph, extras = _unpacked(packed, model)
    return bind(graph, model, extras)


def _unpacked(packed: dict[str, Any], model: nn.Module) -> tuple[Graph, dict[str, Any]]:
    graph = Graph()
    named: dict[str, Node] = {}
    for op, name, target, args, kwargs, kind in packed["nodes"]:
        arguments, keywords = _resolved((args, kwargs), named)
        node = graph.create_node(op, _unpack_target(target), arguments, keywords, name)
        node.meta["type"] = kind
        named[name] = node
    extras: dict[str, Any] = {}
    for name, (what, value) in packed["extras"].items():
        if what == "body":
            extras[name] = unpack(value, model)
        elif what == "graph":
            inner, inside = _unpacked(value, model)
            extras[name] = GraphModule(_holder(inside), inner)
        else:
            extras[name] = value
    return graph, extras


def _resolved(arguments: Any, named: dict[str, Node]) -> Any:
    return map_aggregate(arguments, lambda value: named[value.name] if isinstance(value, _Ref) else value)


def _attributes(gm: GraphModule) -> dict[str, Any]:
    """What a subgraph reads from itself."""
    return {str(n.target): getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"}


def _holder(values: dict[str, Any]) -> nn.Module:
    module = nn.Module()
    for name, value in values.items():
        setattr(module, name, value)
    return module


def _pack_target(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return ("op", target.namespace, target._opname, target._overloadname)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return ("higher", target.name())
    if callable(target):
        return ("function", target.__module__, target.__qualname__)
    return target


def _unpack_target(target: Any) -> Any:
    match target:
        case ("op", namespace, name, overload):
            return getattr(getattr(getattr(torch.ops, namespace), name), overload)
        case ("higher", name):
            return getattr(torch.ops.higher_order, name)
        case ("function", module, name):
            found: Any = importlib.import_module(module)
            for atom in name.split("."):
                found = getattr(found, atom)
            return found
    return target


def move_devices(gm: GraphModule, fn: Callable[[Tensor], Tensor]) -> None:
    """Factories captured with ``device=cpu``, and regions of autocast for it, must follow the model to its new device."""
    changed = False

    def moved(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, torch.device):
            new = fn(torch.empty(0, device=value)).device
            changed |= new != value
            return new
        return value

    for value in gm.__dict__.get("extras", {}).values():
        if isinstance(value, GraphModule):  # the body of a higher-order op
            move_devices(value, fn)
    for node in gm.graph.nodes:
        if node.target in (autocast, torch.ops.higher_order.wrap_with_autocast):
            kind = _device_type_after(node.args[0], fn)
            changed |= kind != node.args[0]
            node.args = (kind, *node.args[1:])
        node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
        if changed:
            node.meta.pop("val", None)
    if changed:
        gm.recompile()


def _device_type_after(kind: str, fn: Callable[[Tensor], Tensor]) -> str:
    try:
        moved = fn(torch.empty(0, device=kind)).device.type
    except (RuntimeError, AssertionError):  # there is no such device here, so nothing of the model was on it
        return kind
    return kind if moved == "meta" else moved
