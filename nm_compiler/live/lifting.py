"""A program without attributes: what it reads from the model become its first inputs, in bodies too.

    %w = self.fc.weight                                  %state_0 = input
    %x = input                                     ->    %x = input
    %y = aten.linear(%x, %w)                             %y = aten.linear(%x, %state_0)
    %z = bodies.checkpointed(%body, %y)                  %z = tag_activation_checkpoint(%body, %state_1, %y)

That is the form in which AOTAutograd and inductor take graphs, with the higher-order ops that they know. Two programs that
differ only in which weights they read are the same lifted graph, so equal layers are compiled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from nm_compiler.capture.bodies import CONTEXT, branch, checkpointed, is_body
from nm_compiler.graph import getattr_path, target_name, type_of

_higher = torch.ops.higher_order


@dataclass(frozen=True)
class Read:
    """Something a program reads: state of the model by name, or a constant of its own."""

    name: str | None
    constant: Tensor | None = None

    @property
    def key(self) -> Any:
        """Equal for two reads of the same thing."""
        return self.name if self.constant is None else id(self.constant)


@dataclass(frozen=True)
class Lifted:
    """A graph whose first inputs are ``reads``, the others those of the program."""

    gm: GraphModule
    reads: tuple[Read, ...]


def lift(program: GraphModule) -> Lifted:
    """Lift a program that is bound to a model. The program is not changed."""
    reads = _unique(_reads(program))
    return Lifted(_lifted(program, reads), reads)


def form_of(gm: GraphModule) -> tuple[Any, ...]:
    """What two lifted graphs that compute the same have in common: ops, arguments and types, not names."""
    places = {node: f"%{index}" for index, node in enumerate(gm.graph.nodes)}
    symbols: dict[str, str] = {}
    lines: list[Any] = []
    for node in gm.graph.nodes:
        arguments = map_arg((node.args, node.kwargs), lambda each: _Place(places[each]))
        what: Any = "" if node.op in ("placeholder", "output") else target_name(node.target)
        if node.op == "get_attr":
            value = getattr_path(gm, node.target)
            what = form_of(value) if isinstance(value, GraphModule) else id(value)
        lines.append((node.op, what, repr(arguments), type_of(node.meta.get("val"), symbols)))
    return tuple(lines)


class _Place(str):
    """A node in printed arguments."""

    def __repr__(self) -> str:
        return str(self)


def _unique(reads: Iterator[Read]) -> tuple[Read, ...]:
    return tuple({read.key: read for read in reads}.values())


def _reads(gm: GraphModule) -> Iterator[Read]:
    """All reads of tensors in a program and its bodies."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = getattr_path(gm, node.target)
            if isinstance(value, Tensor):
                yield _read(gm, node, value)
            elif is_body(value):
                yield from _reads(value)


def _read(gm: GraphModule, node: Node, value: Tensor) -> Read:
    return Read(None, value) if node.target in gm.__dict__["extras"] else Read(str(node.target))


def _lifted(gm: GraphModule, reads: Sequence[Read]) -> GraphModule:
    graph, root = Graph(), nn.Module()
    given: dict[Any, Node] = {read.key: graph.placeholder(f"state_{index}") for index, read in enumerate(reads)}
    copies: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = getattr_path(gm, node.target)
            if isinstance(value, Tensor):
                copies[node] = given[_read(gm, node, value).key]
                copies[node].meta.setdefault("val", node.meta.get("val"))
            elif not is_body(value):
                copies[node] = _child(graph, root, node.name, value)
        elif node.target is checkpointed:
            copies[node] = _checkpoint(graph, root, gm, node, given, copies)
        elif node.target is branch:
            copies[node] = _cond(graph, root, gm, node, given, copies)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in copies and node.op == "call_function":
            copies[node].meta = {key: value for key, value in node.meta.items() if key in ("val", "stack_trace")}
    return GraphModule(root, graph, class_name=type(gm).__name__)


def _child(graph: Graph, root: nn.Module, name: str, value: Any) -> Node:
    setattr(root, name, value)
    return graph.create_node("get_attr", name)


def _checkpoint(
    graph: Graph, root: nn.Module, gm: GraphModule, node: Node, given: dict[Any, Node], copies: dict[Node, Any]
) -> Node:
    body = getattr_path(gm, node.args[0].target)  # type: ignore[union-attr]
    reads = _unique(_reads(body))
    inner = _lifted(body, reads)
    if CONTEXT in body.meta:
        inner.meta[CONTEXT] = body.meta[CONTEXT]
    operands = [given[read.key] for read in reads]
    rest = map_arg(node.args[1:], copies.__getitem__)
    read = _child(graph, root, f"body_{node.name}", inner)
    return graph.call_function(_higher.tag_activation_checkpoint, (read, *operands, *rest), dict(node.kwargs))


def _cond(graph: Graph, root: nn.Module, gm: GraphModule, node: Node, given: dict[Any, Node], copies: dict[Node, Any]) -> Node:
    condition, yes, no, operands = node.args
    bodies = [getattr_path(gm, arm.target) for arm in (yes, no)]  # type: ignore[union-attr]
    reads = _unique(read for body in bodies for read in _reads(body))
    arms = [_child(graph, root, f"body_{node.name}_{i}", _lifted(body, reads)) for i, body in enumerate(bodies)]
    condition, rest = map_arg((condition, tuple(operands)), copies.__getitem__)  # type: ignore[arg-type]
    return graph.call_function(_higher.cond, (condition, *arms, (*(given[read.key] for read in reads), *rest)))
