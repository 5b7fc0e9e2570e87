"""Add what is no plain bias behind a product, so that backends meet constant biases of one number an output.

    before                                    after
    %y = aten.linear(%x, %w, %b)   # of data  %p = aten.linear(%x, %w)
                                              %y = aten.add.Tensor(%p, %b)

A network that computes the bias of another (a hypernetwork, FiLM written as a bias), or one number for all outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import is_constant
from nm_compiler.graph import arguments_of
from nm_compiler.rewrite import following
from nm_compiler.sites.uses import CONVS

aten = torch.ops.aten


def bias_apart(gm: GraphModule) -> GraphModule:
    """Rewrite every linear and convolution whose bias depends on data, or has another shape than its outputs."""
    for node in [node for node in gm.graph.nodes if node.target is aten.linear.default or node.target in CONVS]:
        given = arguments_of(node)
        bias = given["bias"]
        if bias is None or given.get("transposed") or _is_plain(bias, node):
            continue
        if "bias" in node.kwargs:
            node.kwargs = {**node.kwargs, "bias": None}
        else:
            node.args = (*node.args[:2], None, *node.args[3:])
        with following(node):
            total = _sum(gm, node, bias)
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user not in (total, *total.all_input_nodes))
    return gm


def _is_plain(bias: Node, node: Node) -> bool:
    weight: Any = node.args[1]
    return is_constant(bias) and tuple(bias.meta["val"].shape) == tuple(weight.meta["val"].shape[:1])


def _sum(gm: GraphModule, node: Node, bias: Node) -> Node:
    weight: Any = node.args[1]
    space = 0 if node.target is aten.linear.default else weight.meta["val"].ndim - 2
    if space:
        bias = gm.graph.call_function(aten.reshape.default, (bias, [-1, *[1] * space]))
    return gm.graph.call_function(aten.add.Tensor, (node, bias))
