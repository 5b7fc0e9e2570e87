"""Routers: products whose result chooses what other weights a row meets, as a mixture's gate chooses experts.

    %logits = aten.linear(%x, %gate)          [tokens, experts]
    %p      = aten.softmax(%logits, -1)       whatever keeps the experts last
    %top    = aten.topk(%p, 2)                an index of experts for every token,
    %out    = aten._grouped_mm(%rows, ...)    which products after it depend on

They stay dense by default, as pruners and quantisers leave them: few weights, and an error sends a token to another expert.
Fewer choices than inputs, or it is an activation that keeps the largest of a wide layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.graph import arguments_of
from nm_compiler.sites.ends import weighted
from nm_compiler.sites.views import is_view

aten = torch.ops.aten

_INDICES = (aten.argmax.default, aten.argsort.default)
_PAIRS = (aten.topk.default, aten.max.dim, aten.sort.default)  # of values and indices
_SHARES = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)


def routers(gm: GraphModule, fixed: Collection[Node]) -> set[Node]:
    """The products of the graph that choose. fixed: the graph's constants."""
    if not any(node.target in (*_INDICES, *_PAIRS) for node in gm.graph.nodes):
        return set()
    products = weighted(gm, fixed)
    return {node for node in products if any(_leads_to(index, products) for index in _indices_of(node))}


def _indices_of(product: Node) -> Iterator[Node]:
    """What says which of the last axis of a product are largest, whatever is done to each of them before."""
    stack, seen, width = [product], {product}, _width(product)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.target in (*_INDICES, *_PAIRS) and user.args[0] is node and _along_last(user, node):
                yield from (user,) if user.target in _INDICES else (pair for pair in user.users if pair.args[1] == 1)
            elif user not in seen and _keeps_each(user) and width is not None and _width(user) == width:
                seen.add(user)
                stack.append(user)


def _width(node: Node) -> int | None:
    value = node.meta.get("val")
    size = value.shape[-1] if isinstance(value, Tensor) and value.ndim else None
    return size if isinstance(size, int) else None


def _along_last(choice: Node, node: Node) -> bool:
    axis, axes = arguments_of(choice).get("dim"), node.meta["val"].ndim
    return isinstance(axis, int) and axis % axes == axes - 1


def _keeps_each(node: Node) -> bool:
    """Whether entries stay what and where they are along the last axis, compared with their neighbours or not."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in _SHARES or is_view(node)


def _leads_to(index: Node, products: Collection[Node]) -> bool:
    stack, seen = [index], {index}
    while stack:
        for user in stack.pop().users:
            if user in products:
                return True
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return False
