"""SR-STE, sparse-refined straight-through estimator (Zhou et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass
from nm_compiler.methods.base import Clock, Method
from nm_compiler.passes.insert_srste import insert_srste
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.state.beside import Weight
from nm_compiler.state.sharding import write

if TYPE_CHECKING:
    from nm_compiler.methods.bimask import BiMask


@dataclass(frozen=True, slots=True)
class SRSTE(Method):
    """Multiply with the N largest magnitudes of each group, chosen afresh in every forward pass; no state.

    Gradients go straight through to all weights, plus ``decay * (1 - F) * W``, which pulls the pruned ones to zero: in every
    backward pass, so k times over k accumulated batches, and in the gradient of each sample that ``vmap(grad(..))`` takes.
    decoupled: pull them in the scheduler's step in place of the gradient, W -= lr * decay * (1 - F) * W, once a step,
    unseen by momentum and Adam's scaling; give the optimizer to `SparsityScheduler` then. Raises NMError for a negative decay.
    """

    decay: float = 2e-4
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_decay(self.decay, self.name)

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [partial(insert_srste, sites=sites, decay=0.0 if self.decoupled else self.decay)]

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def begin(self, weights: Sequence[Weight], clock: Clock) -> None:
        check_rate(clock, self)

    def advance(self, weights: Sequence[Weight], clock: Clock) -> None:
        if self.decoupled:
            pull(weights, clock, self.decay)


def pull(weights: Sequence[Weight], clock: Clock, decay: float) -> None:
    """W -= lr * decay * (1 - F) * W, F the N largest magnitudes of every group."""
    assert clock.rate is not None
    with torch.no_grad():
        for weight in weights:
            site, value = weight.site, weight.value
            share = clock.rate(weight.param) * decay
            if share:
                mask = magnitude_mask(value, site.pattern.n, site.pattern.m, site.in_axis)
                write(weight.param, torch.where(mask, value, value * (1 - share)))


def check_rate(clock: Clock, method: SRSTE | BiMask) -> None:
    """Raises NMError if a decoupled decay has no learning rate to go by."""
    if method.decoupled and clock.rate is None:
        raise NMError(f"{method.name}(decoupled=True) needs the learning rate: SparsityScheduler(..., optimizer=optimizer)")


def check_decay(decay: float, name: str) -> None:
    """Raises NMError unless decay is a finite number >= 0."""
    if not isinstance(decay, (int, float)) or not 0.0 <= decay < float("inf"):
        raise NMError(f"{name}(decay={decay!r}): the pull on pruned weights is a finite number >= 0, 2e-4 in the papers")
