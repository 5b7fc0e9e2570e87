"""Write every product of data with a constant matrix as one op, `aten.linear`.

    before                                   after
    %w = self.c_fc.weight   # [in, out]      %w = self.c_fc_weight_t    # [out, in], the reduction axis last
    %y = aten.addmm(%b, %x, %w)              %y = aten.linear(%x, %w, %b)

addmm, mm and matmul compute x @ w; with the constant on the right that is linear(x, w.T). The transposed weight is a
constant of the graph, and its groups still run along the input axis, now axis 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import is_constant, value_of
from nm_compiler.rewrite import constant, discard, unused, weight_of

aten = torch.ops.aten


def products_to_linear(gm: GraphModule, *, own: bool = False) -> GraphModule:
    """Rewrite where the right operand is a matrix that depends on nothing but parameters and constants.

    own: the graph's state belongs to nobody else, so that what was transposed is let go as soon as nothing reads it.
    """
    made: dict[Node, Node] = {}
    for node in [node for node in gm.graph.nodes if node.target in _KINDS]:
        bias, data, weight = _operands(node)
        if not _is_matrix(weight) or is_constant(data) or not _is_bias(bias, weight) or not _plain(node):
            continue
        if weight not in made:
            made[weight] = _transposed(gm, weight)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(aten.linear.default, (data, made[weight], bias))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        discard(gm, node, own=own)
    return gm


_KINDS = (aten.addmm.default, aten.mm.default, aten.matmul.default)


def _operands(node: Node) -> tuple[Any, Any, Any]:
    if node.target is aten.addmm.default:
        return node.args[0], node.args[1], node.args[2]
    return None, node.args[0], node.args[1]


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, Node) and len(weight.meta["val"].shape) == 2 and is_constant(weight)


def _is_bias(bias: Any, weight: Node) -> bool:
    """One number an output; anything else that addmm can add stays with it."""
    if bias is None:
        return True
    return isinstance(bias, Node) and bool(list(bias.meta["val"].shape) == list(weight.meta["val"].shape[1:]))


def _plain(node: Node) -> bool:
    return bool(node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1)


def _transposed(gm: GraphModule, weight: Node) -> Node:
    source = weight_of(weight)
    stem = str(weight.target if weight.op == "get_attr" else weight.name).replace(".", "_")
    with gm.graph.inserting_before(weight):
        new = constant(gm, unused(gm, f"{stem}_t"), value_of(gm, weight).detach().t().contiguous())
    if source is not None:
        new.meta["weight"] = source
    return new
