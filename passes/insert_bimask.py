"""Let every product send its input gradient through a weight that is N:M along the output axis too (Bi-Mask, ICML 2023).

    before                          after
    %w = self.fc.weight             %w = self.fc.weight                                # [out, in]
    %v = nm.srste_weight(%w, ...)   %v = nm.srste_weight(%w, ...)                      # W * F
    %y = aten.linear(%x, %v, %b)    %o = self.fc.weight_order                          # [out]
                                    %u = nm.backward_weight(%v, %o, 2, 4, [0, 1])      # W * B, B a subset of F
                                    %y = nm.linear(%x, %v, %u, %b)                     # dx = g (W * B), dW = g^T x

Convolutions become nm.conv, experts behind a grouped matmul nm.grouped_mm, other products nm.einsum; views between the
weight and a product are repeated for W * B:

    %c = aten.chunk(%v, 3)          %c = aten.chunk(%v, 3)        %d = aten.chunk(%u, 3)
    %p = operator.getitem(%c, 1)    %p = operator.getitem(%c, 1)  %q = operator.getitem(%d, 1)
    %y = aten.linear(%x, %p)        %y = nm.linear(%x, %p, %q, None)

With ``folded`` the output rows lie in their order already, and there is none to read:

    %v = nm.srste_weight(%w, ...)   %u = nm.backward_groups(%v, 2, 4, 0)

It runs behind any pass that masks the forward weight. A weight whose output channels do not divide keeps B = F.
Safe because y does not read %u: only the gradient of x changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.fx import GraphModule, Node

from nm_compiler.ops import weights as _weights  # noqa: F401  registers nm::backward_weight
from nm_compiler.rewrite import call, following
from nm_compiler.sites.plan import Site
from nm_compiler.sites.uses import constants
from nm_compiler.two_weights import give_second

nm = torch.ops.nm


def insert_bimask(gm: GraphModule, *, sites: Sequence[Site], folded: bool = False) -> GraphModule:
    """Turn every product of a site into one with two weights. Unless ``folded``, the order must be registered already."""
    fixed = constants(gm.graph)
    for site in sites:
        if site.backward_groups:
            give_second(gm, site, fixed, partial(_backward, gm, site, folded=folded))
    return gm


def _backward(gm: GraphModule, site: Site, forward: Node, *, folded: bool) -> Node:
    name, n, m = f"{forward.name.removesuffix('_masked')}_backward", site.pattern.n, site.pattern.m
    with following(forward):
        if folded:
            return call(gm, nm.backward_groups.default, (forward, n, m, site.layout.out_axis), name)
        order = gm.graph.get_attr(f"{site.name}_order")
        return call(gm, nm.backward_weight.default, (forward, order, n, m, site.rows), name)
