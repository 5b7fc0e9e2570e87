"""Write the masks into the weights: zeros on disk, a plain aten graph.

    before                                            after
    %w = self.fc.weight                               %w = self.fc.weight                 # now exactly N:M
    %v = nm.score_weight(%w, %s, %l, ...)             %y = aten.linear(%x, %w, %b)
    %y = aten.linear(%x, %v, %b)
    %z = nm.conv(%y, %v2, %u2, %c, [1, 1], ...)       %z = aten.conv2d(%y, %w2, %c, [1, 1], ...)

A node that stands for a weight depends on parameters and constants alone, so its value is computed here and copied
into the parameter in place. `nm.linear` and its kin become the products they compute in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import value_of
from nm_compiler.rewrite import is_masked, read_behind, replace
from nm_compiler.runtime.cusparselt.training import cslt_train_linear

aten, nm = torch.ops.aten, torch.ops.nm
_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def masked_values(gm: GraphModule, known: dict[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Every masked parameter with what it becomes, by its id; added to ``known``, where that parameter is not there yet."""
    for node in _masked(gm):
        parameter = value_of(gm, read_behind(node))
        if id(parameter) not in known:
            known[id(parameter)] = parameter, value_of(gm, node)
    return known


def freeze_masks(gm: GraphModule, *, written: bool = False) -> GraphModule:
    """Fold every masked weight into its parameter, in place on the model that the graph is bound to.

    written: the parameters hold their `masked_values` already, those of all graphs of a model: a method need not give the
    same value again for a weight that it has frozen.
    """
    values = () if written else masked_values(gm, {}).values()
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
    for node in _masked(gm):
        node.replace_all_uses_with(read_behind(node))
    for node in list(gm.graph.nodes):
        plain = _plain(node)
        if plain is not None:
            with gm.graph.inserting_before(node):
                replace(node, gm.graph.call_function(*plain))
    return gm


def _masked(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if is_masked(node)]


def _plain(node: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The op and the arguments with which a product of two weights computes its output; None for any other node."""
    args: Any = node.args
    match node.target:
        case nm.linear.default:
            data, weight, _, bias = args
            return aten.linear.default, (data, weight, bias)
        case cslt_train_linear._opoverload:
            data, weight, _, _, bias, *_ = args
            return aten.linear.default, (data, weight, bias)
        case nm.conv.default:
            data, weight, _, bias, *geometry = args
            return _CONV[len(geometry[0])], (data, weight, bias, *geometry)
        case nm.einsum.default:
            data, weight, _, equation = args
            return aten.einsum.default, (equation, [data, weight])
        case nm.grouped_mm.default:
            data, weight, _, offsets, native = args
            op = aten._grouped_mm.default if native else torch.ops.transformers.grouped_mm_fallback.default
            return op, (data, weight, offsets)
    return None
