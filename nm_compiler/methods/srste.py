"""SR-STE, sparse-refined straight-through estimator (Zhou et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass
from nm_compiler.methods.base import Method
from nm_compiler.passes.insert_srste import insert_srste
from nm_compiler.sites import Site


@dataclass(frozen=True, slots=True)
class SRSTE(Method):
    """Multiply with the N largest magnitudes of each group, chosen afresh in every forward pass; no state.

    Gradients go straight through to all weights, plus ``decay * (1 - F) * W``, which pulls the pruned ones to zero.
    Raises NMError for a negative decay.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        check_decay(self.decay, self.name)

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [partial(insert_srste, sites=sites, decay=self.decay)]

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return {}


def check_decay(decay: float, name: str) -> None:
    """Raises NMError unless decay is a finite number >= 0."""
    if not isinstance(decay, (int, float)) or not 0.0 <= decay < float("inf"):
        raise NMError(f"{name}(decay={decay!r}): the pull on pruned weights is a finite number >= 0, 2e-4 in the papers")
