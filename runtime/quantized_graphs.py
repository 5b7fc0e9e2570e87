"""Weights of a graph that torchao has quantised (pt2e): integers in buffers, and the floats of before that nobody reads.

%q = self._frozen_param1                # int8
%w = quantized_decomposed.dequantize_per_channel(%q, %scale, %zero, 0, -128, 127, int8)
%y = aten.linear(%x, %w)                # self.fc.weight is there still, and read by nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nm_compiler.graph import getattr_path


def without_floats(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """``found`` with the weights that a quantised graph multiplies with in the place of those that nothing reads.

    They have the name of the float weight that they were made of, or, if that is gone, of their integers.
    """
    if not isinstance(model, GraphModule):
        return found
    weights = dict(_dequantised(model))
    if not weights:
        return found
    read = {str(node.target) for node in model.graph.find_nodes(op="get_attr")}
    floats = {name: value for name, value in found.items() if name not in read and value.is_floating_point()}
    kept = {name: value for name, value in found.items() if name not in floats}
    for own, weight in weights.items():
        like = {name: float((weight - value).abs().max()) for name, value in floats.items() if value.shape == weight.shape}
        name = min(like, key=like.__getitem__, default=own)
        floats.pop(name, None)
        kept[name] = weight
    return kept


def _dequantised(gm: GraphModule) -> Iterator[tuple[str, Tensor]]:
    """The names of integers that the graph makes floats of, and these."""
    for node in gm.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "quantized_decomposed":
            continue
        given = node.all_input_nodes
        if "dequantize" in str(target) and given and all(each.op == "get_attr" for each in given):
            args: Any = torch.fx.map_arg(node.args, lambda each: getattr_path(gm, each.target))
            if isinstance(node.args[0], Node):
                yield str(node.args[0].target), target(*args, **node.kwargs).detach()
