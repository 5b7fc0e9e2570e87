"""Multiply with the N largest magnitudes of every group; pull the others towards zero (SR-STE, ICLR 2021, eq. 5).

    before                          after
    %w = self.fc.weight             %w = self.fc.weight                                # [out, in]
    %y = aten.linear(%x, %w, %b)    %v = nm.srste_weight(%w, 2, 4, 1, 0.0002)          # [out, in], exactly 2:4
                                    %y = aten.linear(%x, %v, %b)

It is also the forward half of Bi-Mask; `insert_bimask` adds the backward half.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.fx import GraphModule, Node

from nm_compiler.ops import weights as _ops  # noqa: F401  registers nm::srste_weight
from nm_compiler.rewrite import behind, call
from nm_compiler.sites.plan import Site


def insert_srste(gm: GraphModule, *, sites: Sequence[Site], decay: float) -> GraphModule:
    """Put `nm.srste_weight` behind every site's weight. decay: the papers' lambda, 2e-4."""
    for site in sites:
        behind(gm, site.name, partial(_masked, gm, site=site, decay=decay))
    return gm


def _masked(gm: GraphModule, weight: Node, *, site: Site, decay: float) -> Node:
    arguments = (weight, site.pattern.n, site.pattern.m, site.in_axis, decay)
    return call(gm, torch.ops.nm.srste_weight.default, arguments, f"{weight.name}_masked")
