"""Weights that are sparser than the pattern that they are lowered for: packed for their own they would be read faster."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from nm_compiler.pattern import Pattern
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.check import nonzeros, worst_group
from nm_compiler.wording import several

_USUAL = (Pattern(1, 16), Pattern(1, 8), Pattern(1, 4), Pattern(2, 8), Pattern(2, 4), Pattern(4, 8))
"""From the sparsest; of two as sparse the one with smaller groups, which both satisfy, first."""


def sparser(weight: Tensor, site: Site) -> Pattern | None:
    """The sparsest usual pattern that ``weight`` satisfies, if it is sparser than its site's. None for zeros alone."""
    share = nonzeros(weight) / max(1, weight.numel())
    if not share:
        return None
    size = weight.shape[site.in_axis]
    able = (one for one in _USUAL if share <= one.density < site.pattern.density and size % one.m == 0)
    return next((one for one in able if worst_group(weight, one.m, site.in_axis) <= one.n), None)


def sparser_note(model: nn.Module, sites: Iterable[Site]) -> tuple[str, ...]:
    """A line for the report, if there are such weights."""
    found: dict[Pattern, list[str]] = {}
    for site in sites:
        own = sparser(model.get_parameter(site.name).detach(), site)
        if own is not None:
            found.setdefault(own, []).append(site.name)
    if not found:
        return ()
    said = "; ".join(f"{several(names, 3)} {'is' if len(names) == 1 else 'are'} {own}" for own, names in found.items())
    return (f"Sparser than pattern= says: {said}. Packed as that, they take less memory and time.",)
