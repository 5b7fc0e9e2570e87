"""Small steps that the inserting passes share: put an op behind a weight, read state and constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.graph import reads
from nm_compiler.ops.weights import stands_for_weight


def behind(gm: GraphModule, name: str, build: Callable[[Node], Node]) -> None:
    """Replace every read of the weight ``name`` by what ``build(read)`` makes of it, just after the read."""
    for read in reads(gm, name):
        users = list(read.users)
        with gm.graph.inserting_after(read):
            anchor = gm.graph.call_function(_anchor)
        with gm.graph.inserting_before(anchor):
            new = build(read)
        gm.graph.erase_node(anchor)
        for user in users:
            user.replace_input_with(read, new)


def _anchor() -> None:
    """A place in the graph, gone before the pass returns."""


def constant(gm: GraphModule, name: str, value: Tensor) -> Node:
    """Read the constant ``name`` at the insertion point; a constant of that name is there once a graph."""
    gm.__dict__[name] = gm.__dict__["extras"].setdefault(name, value)
    return gm.graph.create_node("get_attr", name)


def call(gm: GraphModule, op: Any, args: tuple[Any, ...], name: str) -> Node:
    """Call ``op`` at the insertion point, in a node called ``name`` so that the graph reads well."""
    return gm.graph.create_node("call_function", op, args, name=name)


def masked_nodes(gm: GraphModule, name: str) -> list[Node]:
    """The nodes that stand for the weight ``name`` in a rewritten graph."""
    return [user for read in reads(gm, name) for user in read.users if stands_for_weight(user.target) and user.args[0] is read]
