"""Nothing planned runs dense: what reads a planned weight is an op that stands for it.

    %w = self.fc.weight
    %v = nm.srste_weight(%w, 2, 4, 1, 0.0002)    # fine
    %y = aten.linear(%x, %w, %b)                 # an NMError that names fc.weight
    %u = mine.other_weight(%v)                   # so is a second op in the place of one weight: freeze writes one of them

It stands behind the last pass of every method, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from nm_compiler.errors import NMError
from nm_compiler.graph import target_name
from nm_compiler.ops.two_masks import TWO_MASKS
from nm_compiler.ops.weights import stands_for_weight
from nm_compiler.rewrite import masked_nodes
from nm_compiler.sites.plan import Site


def check_masked(gm: GraphModule, *, sites: Sequence[Site], by: str) -> GraphModule:
    """Raises NMError if the passes of the method called ``by`` left a planned weight as it was, or put two ops there."""
    planned = {site.name: site for site in sites}
    for read in gm.graph.nodes:
        site = planned.get(read.target) if read.op == "get_attr" else None
        if site and not all(stands_for_weight(user.target) or user.target is TWO_MASKS for user in read.users):
            raise NMError(
                f"{site.name} of shape {list(site.shape)}: the passes of {by} put no op in the place of the weight, which "
                f"would train dense: let {by}.passes() return insert_op, or another pass that masks it, for all of its sites"
            )
        for masked in masked_nodes(gm, site.name) if site else ():
            second = next((user for user in masked.users if stands_for_weight(user.target)), None)
            if site and second is not None:
                raise NMError(
                    f"{site.name} of shape {list(site.shape)}: the passes of {by} put two ops in the place of the weight, "
                    f"{target_name(masked.target)} and then {target_name(second.target)}, of which nm.freeze would write one: "
                    "make it one op that does both"
                )
    return gm
