"""Compute what depends on weights alone, so that every product reads a constant.

    before                                        after
    %w = self.in_proj_weight     # [3 d, d]       %w = self.in_proj_weight_part    # [d, d], rows 0 to d
    %c = aten.chunk(%w, 3)                        %y = aten.linear(%x, %w, %b)
    %p = operator.getitem(%c, 0)
    %y = aten.linear(%x, %p, %b)

Runtimes look for zeros in constants; a chunk, a transpose or a scale between the weight and its product hides them. Views copy
their part of the weight; what else reads the weight keeps reading it. The model is not touched.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from nm_compiler.evaluate import is_constant, value_of
from nm_compiler.rewrite import constant, discard, unused, weight_of
from nm_compiler.sites.equations import PRODUCTS
from nm_compiler.sites.uses import CONVS


def fold_weights(gm: GraphModule, *, own: bool = False) -> GraphModule:
    """Replace every operand of a product or convolution that is computed from parameters and constants by its value.

    own: the graph's state belongs to nobody else, so that what was folded is let go as soon as nothing reads it.
    """
    made: dict[Node, Node] = {}
    for node in [node for node in gm.graph.nodes if node.target in CONVS or node.target in PRODUCTS]:
        for operand in node.all_input_nodes:
            if operand.op == "call_function" and is_constant(operand):
                if operand not in made:
                    made[operand] = _folded(gm, operand)
                node.replace_input_with(operand, made[operand])
                discard(gm, operand, own=own)
    return gm


def _folded(gm: GraphModule, operand: Node) -> Node:
    source = weight_of(operand)
    name = unused(gm, f"{(source or operand.name).replace('.', '_')}_part")
    with gm.graph.inserting_before(operand):
        new = constant(gm, name, value_of(gm, operand).detach().contiguous())
    if source is not None:
        new.meta["weight"] = source
    return new
