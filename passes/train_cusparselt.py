"""Let products of Bi-Mask run on packed weights, forward and backward, where they are whole linears of 2:4 weights.

    before                                              after
    %w = self.fc.weight              # [out, in]        %w = self.fc.weight
    %v = nm.srste_weight(%w, 2, 4, 1, 0.0002)           %o = self.fc.weight_order
    %o = self.fc.weight_order                           %m = nm.two_masks(%w, %o, 2, 4, 0.0002)
    %u = nm.backward_weight(%v, %o, 2, 4, [0, 1])       %v = operator.getitem(%m, 0)      # W * F
    %y = nm.linear(%x, %v, %u, %b)                      %t = operator.getitem(%m, 1)      # ((W * B)[order])^T
                                                        %f = aten.reshape(%x, [-1, in])   # if it is not 2-D
                                                        %z = nm.cslt_train_linear(%f, %v, %t, %o, %b, 16384, False)
                                                        %y = aten.reshape(%z, [.., out])

It runs behind `insert_bimask`. Results stay in columns where elementwise ops lead to such products only, as an MLP's hidden
values do. Safe because both ops compute the numbers of those before them: whether a call packs is decided when it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.graph import propagate_shapes
from nm_compiler.ops.two_masks import TWO_MASKS
from nm_compiler.ops.weights import BACKWARD
from nm_compiler.rewrite import call, following, leading_sizes, masked_nodes, replace
from nm_compiler.runtime.cusparselt.consumers import between, leave_in_columns
from nm_compiler.runtime.cusparselt.eligible import of_pattern, of_sizes
from nm_compiler.runtime.cusparselt.training import cslt_train_linear
from nm_compiler.sites.plan import Site

aten = torch.ops.aten
LINEAR, SRSTE = torch.ops.nm.linear.default, torch.ops.nm.srste_weight.default


def train_cusparselt(gm: GraphModule, *, sites: Sequence[Site], min_tokens: int) -> GraphModule:
    """Rewrite every product of a site without `reasons_of` against it, if all that reads the weight are such products."""
    fit = [site for site in sites if not any(reasons_of(site))]
    rewritten = [new for site in fit for forward in masked_nodes(gm, site.name) for new in _replaced(gm, forward, min_tokens)]
    propagate_shapes(gm)
    moved: set[Node] = set()
    for product in rewritten:
        hidden = between(product, rewritten)
        if hidden is not None:
            product.args = (*product.args[:-1], True)
            moved.update((product, *hidden))
    leave_in_columns(moved)
    return gm


def reasons_of(site: Site) -> Iterator[str]:
    """Why the products of a weight stay dense on any device, all reasons."""
    yield from of_pattern(site.pattern)
    if site.op != "linear" or len(site.shape) != 2:
        yield f"{site.op} is not trained on packed weights, only linears are: write it as torch.nn.functional.linear"
    elif site.layout.in_axis != 1:
        yield "its product reads it transposed: keep it as [out, in]"
    elif site.blocks != 1:
        yield "its products read slices of it: give each a weight of its own"
    else:
        yield from of_sizes(site.shape, torch.bfloat16)


def _replaced(gm: GraphModule, forward: Node, min_tokens: int) -> list[Node]:
    """The new products of one masked weight; none if anything else reads it."""
    backward = next((user for user in forward.users if user.target in BACKWARD), None)
    if forward.target is not SRSTE or backward is None:
        return []
    products = [user for user in forward.users if user is not backward]
    whole = all(each.target is LINEAR and each.args[1:3] == (forward, backward) for each in products)
    if not whole or set(backward.users) != set(products):
        return []
    name = forward.name.removesuffix("_masked")
    weight, n, m, _, decay = forward.args
    order: Any = backward.args[1] if backward.target is BACKWARD[0] else None
    with following(backward):
        both = call(gm, TWO_MASKS, (weight, order, n, m, decay), f"{name}_both")
        masked = call(gm, operator.getitem, (both, 0), f"{name}_forward")
        turned = call(gm, operator.getitem, (both, 1), f"{name}_turned")
    return [_product(gm, each, masked, turned, order, min_tokens) for each in products]


def _product(gm: GraphModule, node: Node, masked: Node, turned: Node, order: Node | None, min_tokens: int) -> Node:
    data: Any = node.args[0]
    out, width = node.meta["val"].shape[-1], data.meta["val"].shape[-1]
    flat = data.meta["val"].ndim == 2
    with gm.graph.inserting_before(node):
        given = data if flat else gm.graph.call_function(aten.reshape.default, (data, [-1, width]))
        arguments = (given, masked, turned, order, node.args[3], min_tokens, False)
        product = call(gm, cslt_train_linear._opoverload, arguments, f"{node.name}_packed")
        result = product
        if not flat:
            result = gm.graph.call_function(aten.reshape.default, (product, [*leading_sizes(gm, data), out]))
    replace(node, result)
    return product
