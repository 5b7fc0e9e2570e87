"""The stem and the head of a graph: products of weights with no weight before them, and with none after them.

embedding ─► linear ─► linear ─► linear        what is weighted: products, convolutions, embeddings, recurrent ops
stem                             head          both stay dense by default, as in the papers
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.fx import GraphModule, Node

from nm_compiler.graph import base_of, getattr_path, target_name, written_by
from nm_compiler.sites.equations import LINEAR, PRODUCTS
from nm_compiler.sites.uses import GROUPED, RECURRENT, embedding_between, multiplied_between
from nm_compiler.sites.views import is_view


def ends(gm: GraphModule, fixed: Collection[Node]) -> tuple[set[Node], set[Node]]:
    """The products of the graph with no weighted op before them (stems) and with none after them (heads).

    What an op writes to memory, as a loop over time does, goes on from there to all that reads it later.
    """
    chosen = weighted(gm, fixed)
    return chosen - _after(gm, chosen), chosen - _before(gm, chosen)


def weighted(gm: GraphModule, fixed: Collection[Node]) -> set[Node]:
    """The products, convolutions, embeddings and recurrent ops of the graph that read a parameter. fixed: its constants."""
    return {node for node in gm.graph.nodes if _is_weighted(gm, node, fixed)}


def _after(gm: GraphModule, chosen: set[Node]) -> set[Node]:
    after, filled = set[Node](), set[Node]()
    for node in gm.graph.nodes:
        if any(arg in after or arg in chosen or base_of(arg) in filled for arg in node.all_input_nodes):
            after.add(node)
            filled.update(written_by(node))
    return after


def _before(gm: GraphModule, chosen: set[Node]) -> set[Node]:
    before, wanted = set[Node](), set[Node]()
    for node in reversed(gm.graph.nodes):
        if any(user in before or user in chosen for user in node.users) or not wanted.isdisjoint(written_by(node)):
            before.add(node)
        if node in before or node in chosen:
            wanted.update(base_of(arg) for arg in node.all_input_nodes)
    return before


def _is_weighted(gm: GraphModule, node: Node, fixed: Collection[Node]) -> bool:
    """A product, convolution (also transposed), embedding or recurrent op that reads a parameter."""
    if node.target in (multiplied_between, embedding_between):
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node in fixed and node.target is not LINEAR:  # weights multiplied with weights
        return False
    name = node.target._opname
    product = node.target in PRODUCTS or target_name(node.target) in GROUPED or name == "bilinear"
    known = product or name.startswith(("conv", "embedding")) or name in RECURRENT
    return known and any(_holds_weight(gm, arg, fixed) for arg in node.all_input_nodes)


def _holds_weight(gm: GraphModule, node: Node, fixed: Collection[Node]) -> bool:
    """Whether a node is computed from a parameter of two or more axes alone, or is rows of one that an index chose."""
    if node.op == "get_attr":
        value = getattr_path(gm, node.target)
        return isinstance(value, nn.Parameter) and value.ndim >= 2
    if node in fixed:
        return any(_holds_weight(gm, arg, fixed) for arg in node.all_input_nodes)
    first = node.args[0] if node.op == "call_function" and node.args else None
    return isinstance(first, Node) and is_view(node) and _holds_weight(gm, first, fixed)
