"""Gradual magnitude pruning to N:M (Zhu & Gupta, 2017, group by group): from M of M down to N of M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nm_compiler.graph import Pass
from nm_compiler.layout import as_groups
from nm_compiler.methods.base import Clock, Method
from nm_compiler.methods.decline import check_decline, left, window
from nm_compiler.methods.magnitude import unpacked
from nm_compiler.passes.insert_fixed_masks import insert_fixed_masks
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.combinations import pack
from nm_compiler.state.beside import Weight


@dataclass(frozen=True, slots=True)
class Gradual(Method):
    """Keep all M of a group at first, and fewer of the largest magnitudes step by step, until N are left at ``t_f``.

    ``N + ceil((M - N) (1 - tau)^power)`` stay, tau from 0 at ``t_i`` to 1 at ``t_f`` (shares of the training steps). What was
    pruned stays so and gets no gradient. A bit a weight, as `Magnitude`. Ref: Zhu & Gupta, arXiv 1710.01878, eq. 1.
    Raises NMError unless ``0 <= t_i < t_f <= 1`` and power is a whole number from 1 to 8.
    """

    t_i: float = 0.0
    t_f: float = 0.5
    power: int = 3

    def __post_init__(self) -> None:
        check_decline(self.name, self.t_i, self.t_f, self.power)

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [partial(insert_fixed_masks, sites=sites)]

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return ("mask",)

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return {"mask": pack(torch.ones(site.shape, dtype=torch.bool, device=weight.device).flatten(1))}

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        least = int(self._kept(site, state["mask"]).min())
        return None if least >= site.pattern.n else f"the mask keeps {least} of a group, at least {site.pattern.n} must stay"

    def remark(self, weight: Weight) -> str | None:
        return None if self.is_settled(weight) else "training: more than N of a group are still kept"

    def is_settled(self, weight: Weight) -> bool:
        return bool((self._kept(weight.site, weight.read("mask")) == weight.site.pattern.n).all())

    def settle(self, weight: Weight) -> None:
        self._prune(weight, weight.site.pattern.n)

    def advance(self, weights: Sequence[Weight], clock: Clock) -> None:
        for weight in weights:
            keep = self.keep(weight.site, clock.step, clock.total)
            if keep < self.keep(weight.site, clock.step - 1, clock.total):
                self._prune(weight, keep)

    def catch_up(self, weights: Sequence[Weight], clock: Clock) -> None:
        for weight in weights:
            keep = self.keep(weight.site, clock.step, clock.total)
            if bool((self._kept(weight.site, weight.read("mask")) > keep).any()):
                self._prune(weight, keep)

    def keep(self, site: Site, step: int, total: int) -> int:
        """How many of a group are kept after ``step`` of ``total`` steps."""
        return left(step, window(self.t_i, self.t_f, total), self.power, entries=site.pattern.m, last=site.pattern.n)

    def _kept(self, site: Site, bits: Tensor) -> Tensor:
        return as_groups(unpacked(bits, site), site.rows, site.pattern.m).sum(-1)

    def _prune(self, weight: Weight, keep: int) -> None:
        """Keep the largest of those that are still there; the lower index among equals."""
        site, mask = weight.site, unpacked(weight.read("mask"), weight.site)
        magnitudes = as_groups(weight.value.abs().masked_fill(~mask, -1.0), site.rows, site.pattern.m)
        best = magnitudes.argsort(dim=-1, descending=True, stable=True)[..., :keep]
        as_groups(mask.zero_(), site.rows, site.pattern.m).scatter_(-1, best, True)
        weight.write("mask", pack(mask.flatten(1)))
