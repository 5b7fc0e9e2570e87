"""Give every N:M weight its learnable combination scores (LBC, NeurIPS 2022, section 3.2).

    before                          after
    %w = self.fc.weight             %w = self.fc.weight                                      # [out, in]
    %y = aten.linear(%x, %w, %b)    %s = self.fc.weight_scores                               # [out, in], by position
                                    %l = self.fc.weight_live                                 # [out, in / m, ceil(C / 8)]
                                    %t = self.unions_2of4                                    # [ceil(C / 8), 256, m]
                                    %v = nm.score_weight(%w, %s, %l, %t, 1, [0, 1], True)
                                    %y = aten.linear(%x, %v, %b)

Safe because a live set that covers every position makes the mask all ones, and the product itself is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.graph import getattr_path
from nm_compiler.ops import weights as _ops  # noqa: F401  registers nm::score_weight
from nm_compiler.pattern import Pattern, combination_table
from nm_compiler.rewrite import behind, call, constant
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.combinations import byte_table

nm = torch.ops.nm


def insert_scores(gm: GraphModule, *, sites: Sequence[Site], by_position: bool) -> GraphModule:
    """Put `nm.score_weight` behind every site's weight. The state must be registered on the model already."""
    for site in sites:
        behind(gm, site.name, partial(_scored, gm, site=site, by_position=by_position))
    return gm


def _scored(gm: GraphModule, weight: Node, *, site: Site, by_position: bool) -> Node:
    graph, pattern = gm.graph, site.pattern
    scores = graph.get_attr(f"{site.name}_scores")
    live = graph.get_attr(f"{site.name}_live")
    name, make = table_of(pattern, by_position)
    known = gm.__dict__["extras"].get(name)
    table = constant(gm, name, make().to(getattr_path(gm, weight.target).device) if known is None else known)
    last = 1 if pattern.has_table else pattern.n
    arguments = (weight, scores, live, table, last, site.rows, by_position)
    return call(gm, nm.score_weight.default, arguments, f"{weight.name}_masked")


def table_of(pattern: Pattern, by_position: bool) -> tuple[str, Callable[[], Tensor]]:
    """Name and maker of the table that turns a live set into a mask: packed, unpacked or positions."""
    suffix = f"{pattern.n}of{pattern.m}"
    if not by_position:
        return f"combinations_{suffix}", lambda: combination_table(pattern)
    if pattern.has_table:
        return f"unions_{suffix}", lambda: byte_table(pattern)
    return f"positions_{suffix}", lambda: _eye(pattern.m)


def _eye(m: int) -> Tensor:
    return torch.eye(m, dtype=torch.uint8)
