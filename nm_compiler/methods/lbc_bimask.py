"""LBC forward, Bi-Mask backward: which weights to keep is learned, and the input gradient is N:M along the output axis too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass
from nm_compiler.methods.base import Clock
from nm_compiler.methods.bimask import BiMask
from nm_compiler.methods.lbc import LBC
from nm_compiler.passes.insert_bimask import insert_bimask
from nm_compiler.sites.plan import Site
from nm_compiler.state.beside import Weight


@dataclass(frozen=True, slots=True)
class LBCBiMask(LBC):
    """`LBC` with the backward mask of `BiMask`, which neither paper has.

    F is LBC's: dense at first, exactly N:M from ``t_f`` on. B keeps the N largest of every M output channels of W * F from the
    first step on, in an order that is searched again as ``backward`` says: its interval, moves, objective and search. Its
    decay has no part in this: LBC gives retired weights no gradient. Options of LBC as there.
    """

    backward: BiMask = field(default_factory=BiMask)

    def __post_init__(self) -> None:
        LBC.__post_init__(self)
        if self.backward.products != "dense":
            raise NMError(
                "LBCBiMask(backward=BiMask(products='cusparselt')): LBC's forward mask is not N:M before t_f, and cannot "
                "be packed; use nm.BiMask(products='cusparselt')"
            )

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [*LBC.passes(self, sites), partial(insert_bimask, sites=sites, folded=self.backward.fold)]

    @property
    def backward_share(self) -> float:
        return self.backward.backward_share

    @property
    def folds(self) -> bool:
        return self.backward.folds

    def layout(self) -> Mapping[str, Any]:
        return {**LBC.layout(self), **({"fold": True} if self.backward.fold else {})}

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return {**LBC.state(self, site, weight), **self.backward.state(site, weight)}

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return (*LBC.suffixes(self, site), *self.backward.suffixes(site))

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        return LBC.problem(self, site, state) or self.backward.problem(site, state)

    def remark(self, weight: Weight) -> str | None:
        return LBC.remark(self, weight) or self.backward.remark(weight)

    def advance(self, weights: Sequence[Weight], clock: Clock) -> None:
        LBC.advance(self, weights, clock)
        self.backward.search_orders(weights, clock, self.forward_mask)
