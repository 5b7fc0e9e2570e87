"""Give linears two axes, tokens and features, which is the form that sparse products have.

    before                                       after
    %y = aten.linear(%x, %w, %b)  # [B, T, K]    %t = aten.reshape(%x, [-1, K])      # [B T, K]
                                                 %p = aten.linear(%t, %w, %b)        # [B T, N]
                                                 %y = aten.reshape(%p, [B, T, N])

Torch-TensorRT would otherwise reshape the weight, which hides its zeros from the sparse kernels. A reshape of a contiguous
tensor is free.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from nm_compiler.rewrite import leading_sizes, replace

aten = torch.ops.aten


def flatten_tokens(gm: GraphModule) -> GraphModule:
    """Rewrite every `aten.linear` of data with more than two axes."""
    for node in [node for node in gm.graph.nodes if node.target is aten.linear.default]:
        data, weight = node.args[:2]
        if isinstance(data, Node) and isinstance(weight, Node) and data.meta["val"].ndim > 2:
            out, width = weight.meta["val"].shape
            with gm.graph.inserting_before(node):
                tokens = gm.graph.call_function(aten.reshape.default, (data, [-1, width]))
                product = gm.graph.call_function(aten.linear.default, (tokens, *node.args[1:]), node.kwargs)
                result = gm.graph.call_function(aten.reshape.default, (product, [*leading_sizes(gm, data), out]))
            replace(node, result)
    return gm
