"""What to keep of a weight that is seen in parts: magnitude, Wanda or RIA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.importance import magnitude, ria, wanda
from nm_compiler.solvers.masks import masked, top_mask
from nm_compiler.solvers.select import keep
from nm_compiler.streaming.parts import PART
from nm_compiler.streaming.statistics import HOW

IMPORTANCES = ("magnitude", "wanda", "ria")
Parts = Callable[[], Iterable[tuple[slice, Tensor]]]


@dataclass(frozen=True, slots=True)
class Judge:
    """A rule by name. norms: by weight, ``[in]``, for wanda and ria."""

    rule: str = "magnitude"
    norms: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def pruned(self, site: Site, parts: Parts) -> Iterable[Tensor]:
        """Every part with zeros where the pattern keeps nothing.

        parts: gives slices of axis 0 with their values, contiguous and in whole groups; called twice where the rule needs
        sums over the whole weight.
        """
        axis, pattern = site.in_axis, site.pattern
        if self.rule == "magnitude":
            space: Tensor | None = None
            for _, values in parts():
                if space is None:
                    space = torch.empty_like(values)
                yield masked(values, pattern=pattern, axis=axis, out=space[: len(values)])
            return
        sums = _sums(site, parts) if self.rule == "ria" else None
        for where, values in parts():
            yield keep(values, top_mask(self.worth(site, where, values, sums), pattern=pattern, axis=axis))

    def pruned_whole(self, site: Site, values: Tensor, moved: Callable[[Tensor], Tensor]) -> Tensor:
        """A whole weight pruned after ``moved`` has put its entries, and their importance, in another order."""
        if self.rule == "magnitude":
            return masked(moved(values), pattern=site.pattern, axis=site.in_axis)
        return keep(moved(values), top_mask(moved(self.worth_whole(site, values)), pattern=site.pattern, axis=site.in_axis))

    def worth_whole(self, site: Site, values: Tensor) -> Tensor:
        """The importance of a whole weight, made in parts: float32, the weight's dtype for magnitude."""
        if self.rule == "magnitude":
            return values.abs()
        step = max(1, PART // max(1, values.shape[1] if values.ndim > 1 else 1))

        def cut() -> Iterable[tuple[slice, Tensor]]:
            for begin in range(0, len(values), step):
                yield slice(begin, begin + step), values[begin : begin + step]

        sums = _sums(site, cut) if self.rule == "ria" else None
        found = torch.empty(values.shape, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
        for where, part in cut():
            found[where] = self.worth(site, where, part, sums)
        return found

    def worth(self, site: Site, where: slice, values: Tensor, sums: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The importance of a part, or of a whole weight, not negative. sums: of the whole weight, by row and by column."""
        if self.rule == "magnitude":
            return values.abs()
        norms = self.norms[site.name].double()
        squares = (norms[where].unsqueeze(1) if site.in_axis == 0 else norms).square()
        if self.rule == "wanda":
            return wanda(values, squares)
        if sums is not None:  # along axis 0 a part has its own entries of what runs along it
            at = site.in_axis == 0
            sums = (sums[0] if at else sums[0][where], sums[1][where] if at else sums[1])
        return ria(values, squares, out_axis=site.layout.out_axis, row_axes=[site.in_axis], sums=sums)


def check_rule(rule: str, has_statistics: bool) -> None:
    """Raise NMError for a rule that is unknown, lacks its statistics, or has some that it does not use."""
    if rule not in IMPORTANCES:
        raise NMError(f"importance={rule!r}: choose from {', '.join(IMPORTANCES)}")
    if rule != "magnitude" and not has_statistics:
        raise NMError(f"importance={rule!r} needs the norms of every weight's inputs, in a file. To make one: {HOW}")
    if rule == "magnitude" and has_statistics:
        raise NMError("importance='magnitude' does not use statistics: choose wanda or ria, or leave them out")


def _sums(site: Site, parts: Parts) -> tuple[Tensor, Tensor]:
    """The magnitudes of a weight summed by row (over its inputs) and by column (over its outputs), axes kept."""
    along, across = list[Tensor](), torch.zeros((), dtype=torch.float64)
    for _, values in parts():
        size = magnitude(values)
        along.append(size.sum(1, keepdim=True))
        across = across + size.sum(0, keepdim=True)  # of a part in its own precision: the sum over all parts in float64
    first, second = torch.cat(along), across.to(along[0].dtype)
    return (second, first) if site.in_axis == 0 else (first, second)
