"""Leave the graph as it is, or stop: every planned weight has at most N non-zeros in each group.

before                          after
%w = self.fc.weight             %w = self.fc.weight          # checked: 2:4 along `in`
%y = aten.linear(%x, %w, %b)    %y = aten.linear(%x, %w, %b)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from nm_compiler.errors import NMError
from nm_compiler.graph import getattr_path, reads
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.check import worst_group


def check_pattern(gm: GraphModule, *, sites: Sequence[Site]) -> GraphModule:
    """Raise NMError that names the weight, its shape and its fullest group; the graph is returned unchanged."""
    for site in sites:
        if not reads(gm, site.name):
            continue
        fullest = worst_group(getattr_path(gm, site.name), site.pattern.m, site.in_axis)
        if fullest > site.pattern.n:
            raise NMError(
                f"{site.name} of shape {list(site.shape)} is not {site.pattern}: a group along axis {site.in_axis} has "
                f"{fullest} non-zeros; freeze the model again, and keep weights untouched afterwards"
            )
    return gm
