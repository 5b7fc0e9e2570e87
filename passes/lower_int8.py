"""Compute linears of 2:4 weights in 8 bits with cuSPARSELt: weights packed and rounded once, inputs at every call.

    before                                             after
    %w = self.fc.weight            # [out, in], 2:4    %p = self.fc_weight_int8           # int8, packed: 5/16 of the bytes
    %y = aten.linear(%x, %w, %b)   # [tokens, out]     %s = self.fc_weight_scale          # f32 [out]
                                                       %z = nm.cslt_linear_int8(%x, %p, %s, %b, in, False)
                                                       %y = aten.contiguous(%z)           # z lies in columns

It runs behind `flatten_tokens` and before `lower_cusparselt`, which then takes what is left. Not a rewrite that keeps the
numbers: inputs share one scale for a whole call, so it is only done for weights that the user names.
Ref: Mishra et al. 2021, section 3; Dettmers et al. 2022 (LLM.int8) for what outliers in the inputs do to such a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import value_of
from nm_compiler.graph import arguments_of
from nm_compiler.rewrite import call, constant, replace
from nm_compiler.runtime.cusparselt.candidates import Candidate
from nm_compiler.runtime.cusparselt.int8 import cslt_linear_int8, pack_int8

aten = torch.ops.aten


def lower_int8(gm: GraphModule, *, found: Iterable[Candidate], choose: Callable[[Node], bool]) -> GraphModule:
    """Lower the products of ``found`` that ``choose(node)`` names; they are linears of `[tokens, in]` that int8 can take."""
    packed: dict[Node, tuple[Node, Node]] = {}
    for each in found:
        node, weight = each.node, each.weight
        if not choose(node):
            continue
        if weight not in packed:
            whole, scale = pack_int8(value_of(gm, weight).detach())
            with gm.graph.inserting_after(weight):
                packed[weight] = (
                    constant(gm, f"{weight.name}_int8", whole),
                    constant(gm, f"{weight.name}_scale", scale),
                )
        given = (node.args[0], *packed[weight], arguments_of(node)["bias"], each.product.shape[1], False)
        with gm.graph.inserting_before(node):
            columns = call(gm, cslt_linear_int8._opoverload, given, f"{node.name}_int8")
            result = gm.graph.call_function(aten.contiguous.default, (columns,))
        replace(node, result)
    return gm
