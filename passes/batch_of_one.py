"""Give convolutions without a batch one of a single image, which is the form that sparse products have.

    before                                          after
    %y = aten.conv2d(%x, %w, %b)  # of [C, H, W]    %u = aten.unsqueeze(%x, 0)        # [1, C, H, W]
                                                    %p = aten.conv2d(%u, %w, %b)      # [1, N, H, W]
                                                    %y = aten.squeeze(%p, 0)          # [N, H, W]

torch does the same within the op, so the numbers and strides are the same too. Convolutions whose weight is not N:M stay as
they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.rewrite import replace, weight_of
from nm_compiler.sites.uses import CONVS

aten = torch.ops.aten


def batch_of_one(gm: GraphModule) -> GraphModule:
    """Rewrite every convolution of a planned weight whose data has as many axes as one image."""
    for node in [node for node in gm.graph.nodes if node.target in CONVS]:
        data, weight = node.args[:2]
        if not _is_one(data, weight) or weight_of(weight) is None:
            continue
        with gm.graph.inserting_before(node):
            images = gm.graph.call_function(aten.unsqueeze.default, (data, 0))
            product = gm.graph.call_function(node.target, (images, *node.args[1:]), node.kwargs)
            result = gm.graph.call_function(aten.squeeze.dim, (product, 0))
        replace(node, result)
    return gm


def _is_one(data: Any, weight: Any) -> bool:
    """Whether there is an axis less than a weight has: [C, ...] instead of [B, C, ...]."""
    operands = isinstance(data, Node) and isinstance(weight, Node) and weight.op == "get_attr"
    return operands and bool(data.meta["val"].ndim == weight.meta["val"].ndim - 1)
