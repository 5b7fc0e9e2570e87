"""Write every product of data with a constant matrix as one op, `aten.linear`.

    before                                   after
    %w = self.c_fc.weight   # [in, out]      %w = self.c_fc_weight_t    # [out, in], the reduction axis last
    %y = aten.addmm(%b, %x, %w)              %y = aten.linear(%x, %w, %b)

addmm, mm and matmul compute x @ w; with the constant on the right that is linear(x, w.T). The transposed weight is a
constant of the graph, and its groups still run along the input axis, now axis 1. With the constant on the left, as it is:

    %y = aten.matmul(%w, %x)                 %t = aten.transpose(%x, -2, -1)
                                             %p = aten.linear(%t, %w)
                                             %y = aten.contiguous(aten.transpose(%p, -2, -1))
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import is_constant, value_of
from nm_compiler.rewrite import constant, discard, replace, unused, weight_of

aten = torch.ops.aten


def products_to_linear(gm: GraphModule, *, own: bool = False) -> GraphModule:
    """Rewrite where one operand is a matrix that depends on nothing but parameters and constants, and the other on data.

    own: the graph's state belongs to nobody else, so that what was transposed is let go as soon as nothing reads it.
    """
    made: dict[Node, Node] = {}
    for node in [node for node in gm.graph.nodes if node.target in _KINDS]:
        bias, data, weight = _operands(node)
        if _is_left(data, weight) and _plain(node):
            with gm.graph.inserting_before(node):
                new = _turned(gm, node, bias, matrix=data, data=weight)
            replace(node, new)
            continue
        if node.target not in _RIGHT or not _is_matrix(weight) or is_constant(data):
            continue
        if not _is_bias(bias, weight) or not _plain(node):
            continue
        if weight not in made:
            made[weight] = _transposed(gm, weight)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(aten.linear.default, (data, made[weight], bias))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        discard(gm, node, own=own)
    return gm


_RIGHT = (aten.addmm.default, aten.mm.default, aten.matmul.default)
_ADDED = (aten.addmm.default, aten.addmv.default)
_KINDS = (*_RIGHT, aten.addmv.default, aten.mv.default)


def _operands(node: Node) -> tuple[Any, Any, Any]:
    if node.target in _ADDED:
        return node.args[0], node.args[1], node.args[2]
    return None, node.args[0], node.args[1]


def _is_left(matrix: Any, data: Any) -> bool:
    """Whether the left operand is a planned weight, and the right one data."""
    planned = _is_matrix(matrix) and matrix.op == "get_attr" and weight_of(matrix) is not None
    return planned and isinstance(data, Node) and not is_constant(data)


def _turned(gm: GraphModule, node: Node, added: Any, *, matrix: Node, data: Node) -> Node:
    """``matrix @ data + added``, where the matrix is a linear's weight already; lying as it did."""

    def called(op: Any, *args: Any) -> Node:
        return gm.graph.call_function(op, args)

    if data.meta["val"].ndim == 1:
        product = called(aten.linear.default, data, matrix)
    else:
        product = called(aten.linear.default, called(aten.transpose.int, data, -2, -1), matrix)
        product = called(aten.transpose.int, product, -2, -1)
        if node.meta["val"].is_contiguous():
            product = called(aten.contiguous.default, product)
    return product if added is None else called(aten.add.Tensor, product, added)


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
