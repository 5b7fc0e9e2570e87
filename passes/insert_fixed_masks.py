"""Multiply with a mask that was chosen once and never changes (one-shot magnitude, then fine-tuning; ASP, 2021).

before                          after
%w = self.fc.weight             %w = self.fc.weight                                # [out, in]
%y = aten.linear(%x, %w, %b)    %m = self.fc.weight_mask                           # [out, ceil(in / 8)], one bit a weight
                                %k = nm.unpack_mask(%m, [out, in])                 # bool [out, in]
                                %v = nm.masked_weight(%w, %k)
                                %y = aten.linear(%x, %v, %b)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.fx import GraphModule, Node

from nm_compiler.ops import masks as _ops  # noqa: F401  registers nm::unpack_mask
from nm_compiler.rewrite import behind, call
from nm_compiler.sites.plan import Site


def insert_fixed_masks(gm: GraphModule, *, sites: Sequence[Site]) -> GraphModule:
    """Put `nm.masked_weight` behind every site's weight. The packed mask must be registered on the model already."""
    for site in sites:
        behind(gm, site.name, partial(_masked, gm, site=site))
    return gm


def _masked(gm: GraphModule, weight: Node, *, site: Site) -> Node:
    bits = gm.graph.get_attr(f"{site.name}_mask")
    mask = call(gm, torch.ops.nm.unpack_mask.default, (bits, list(site.shape)), f"{weight.name}_unpacked")
    return call(gm, torch.ops.nm.masked_weight.default, (weight, mask), f"{weight.name}_masked")
