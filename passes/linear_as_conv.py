"""Compute linears as 1x1 convolutions, the form for which TensorRT's sparse kernels are oldest.

    before                                            after
    %w = self.fc.weight          # [N, K]             %w = self.fc_weight_1x1                # [N, K, 1, 1], same storage
    %y = aten.linear(%x, %w, %b) # [..., K]           %t = aten.reshape(%x, [-1, K, 1, 1])   # a token is a batch item
                                                      %c = aten.conv2d(%t, %w, %b)           # [tokens, N, 1, 1]
                                                      %y = aten.reshape(%c, [..., N])

A 1x1 convolution of a 1x1 image is that product, and the groups of an N:M weight stay along axis 1. Opt-in, by weight:
which form is faster is for the runtime to measure. The weights are constants of the graph; the model is not touched.
Background: NVIDIA/TensorRT issues 2271 and 3849 (linears that TensorRT did not run sparse).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import value_of
from nm_compiler.graph import arguments_of
from nm_compiler.rewrite import constant, leading_sizes, replace, unused, weight_of

aten = torch.ops.aten


def linear_as_conv(gm: GraphModule, *, include: Sequence[str] = ("*",)) -> GraphModule:
    """Rewrite every `aten.linear` whose weight is a parameter or constant with a name that a glob of ``include`` matches."""
    for node in [node for node in gm.graph.nodes if node.target is aten.linear.default]:
        data, read = node.args[0], node.args[1]
        named = isinstance(read, Node) and read.op == "get_attr"
        if named and data.meta["val"].ndim and any(fnmatchcase(str(read.target), glob) for glob in include):
            _rewrite(gm, node, data, read)
    return gm


def _rewrite(gm: GraphModule, node: Node, data: Node, read: Node) -> None:
    weight = value_of(gm, read).detach()
    out, width = weight.shape
    source = weight_of(read)
    with gm.graph.inserting_before(node):
        kernel = constant(gm, unused(gm, f"{read.target}_1x1".replace(".", "_")), weight.view(out, width, 1, 1))
        tokens = gm.graph.call_function(aten.reshape.default, (data, [-1, width, 1, 1]))
        bias = arguments_of(node)["bias"]
        product = gm.graph.call_function(aten.conv2d.default, (tokens, kernel, *([] if bias is None else [bias])))
        result = gm.graph.call_function(aten.reshape.default, (product, [*leading_sizes(gm, data), out]))
    if source is not None:
        kernel.meta["weight"] = source
    replace(node, result)
