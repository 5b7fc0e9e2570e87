"""Small steps that passes share: put an op behind a weight or in the place of another, read state and constants."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.graph import getattr_path, reads
from nm_compiler.ops.two_masks import TWO_MASKS
from nm_compiler.ops.weights import stands_for_weight


def behind(gm: GraphModule, name: str, build: Callable[[Node], Node]) -> None:
    """Replace every read of the weight ``name`` by what ``build(read)`` makes of it, just after the read."""
    for read in reads(gm, name):
        users = list(read.users)
        with following(read):
            new = build(read)
        for user in users:
            user.replace_input_with(read, new)


def following(node: Node) -> AbstractContextManager[None]:
    """Inside, nodes are inserted just behind ``node``, in the order in which they are made."""
    place: AbstractContextManager[None] = node.graph.inserting_before(node.next)
    return place


def replace(node: Node, new: Node) -> None:
    """Put ``new`` in the place of ``node``, which goes: whoever read that reads it, and it has its shape and dtype."""
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def constant(gm: GraphModule, name: str, value: Tensor) -> Node:
    """Read the constant ``name`` at the insertion point; a constant of that name is there once a graph."""
    gm.__dict__[name] = gm.__dict__["extras"].setdefault(name, value)
    return gm.graph.create_node("get_attr", name)


def unused(gm: GraphModule, stem: str) -> str:
    """A name for a constant that nothing of the graph has: ``stem``, with a number behind it if it has to be."""
    numbered = (f"{stem}{number or ''}" for number in itertools.count())
    return next(name for name in numbered if name not in gm.__dict__["extras"] and not hasattr(gm, name))


def discard(gm: GraphModule, node: Node, *, own: bool) -> None:
    """Erase a node that nobody reads, and what nobody reads then.

    own: also drop parameters, buffers and constants that the graph does not read any more, so that their memory is free:
    only where they belong to nobody else.
    """
    if node._erased or node.users or node.op not in ("call_function", "get_attr"):
        return
    operands = node.all_input_nodes
    gm.graph.erase_node(node)
    if node.op == "get_attr" and own and not reads(gm, str(node.target)):
        owner, _, leaf = str(node.target).rpartition(".")
        held: Any = getattr_path(gm, owner) if owner else gm
        for values in (held._parameters, held._buffers, gm.__dict__["extras"] if held is gm else {}):
            values.pop(leaf, None)
        held.__dict__.pop(leaf, None)
    for operand in operands:
        discard(gm, operand, own=own)


def weight_of(node: Node) -> str | None:
    """The name of the parameter that a constant was made of: its own, or what the pass that made it says."""
    if node.op == "get_attr":
        named: str | None = node.meta.get("weight")
        return named
    return next((found for each in node.all_input_nodes if (found := weight_of(each))), None)


def leading_sizes(gm: GraphModule, data: Node) -> list[Any]:
    """All sizes of ``data`` but the last, for a reshape: one that alone is dynamic is left to it, several are read.

    Of several one may be 0, and then nothing tells the one that is left.
    """
    shape, sizes = data.meta["val"].shape[:-1], list[Any]()
    alone = sum(not isinstance(size, int) for size in shape) == 1
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
        elif alone:
            sizes.append(-1)
        else:
            sizes.append(gm.graph.call_function(torch.ops.aten.sym_size.int, (data, axis)))
    return sizes


def call(gm: GraphModule, op: Any, args: tuple[Any, ...], name: str) -> Node:
    """Call ``op`` at the insertion point, in a node called ``name`` so that the graph reads well."""
    return gm.graph.create_node("call_function", op, args, name=name)


def masked_nodes(gm: GraphModule, name: str) -> list[Node]:
    """The nodes that stand for the weight ``name`` in a rewritten graph."""
    users = [user for read in reads(gm, name) for user in read.users if user.args[0] is read]
    both = [half for user in users if user.target is TWO_MASKS for half in user.users if half.args[1] == 0]
    return [user for user in users if stands_for_weight(user.target)] + both


def read_behind(masked: Node) -> Node:
    """The read of the parameter that a node of `masked_nodes` stands for."""
    source: Any = masked.args[0]
    return source.args[0] if source.target is TWO_MASKS else source  # type: ignore[no-any-return]


def is_masked(node: Node) -> bool:
    """Whether a node stands for a weight, of whatever name."""
    source: Any = node.args[0] if node.args else None
    half = node.target is operator.getitem and isinstance(source, Node) and source.target is TWO_MASKS
    return stands_for_weight(node.target) or (half and node.args[1:] == (0,))
