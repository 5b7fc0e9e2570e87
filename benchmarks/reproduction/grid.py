"""Which runs a table has, and with which hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import nm_compiler as nm
from nm_compiler.methods.transposable import Transposable
from nm_compiler.solvers.backward_order import kept_importance


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all runs of a table share; the defaults are those of Bi-Mask's CIFAR-10 experiments but for ``t_f``, LBC's.

    epochs may have a fraction. decay: of pruned weights (SR-STE, Bi-Mask); interval: steps between Bi-Mask's searches;
    limit: training images, all of them if None; precision: fp32, or bf16 for products under autocast.
    """

    epochs: float = 300.0
    batch: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    smoothing: float = 0.1
    decay: float = 2e-4
    interval: int = 100
    t_f: float = 0.5
    limit: int | None = None
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False


class Options(Protocol):
    """What the methods need of a recipe, be it of images or of text."""

    @property
    def decay(self) -> float:
        """Of pruned weights."""

    @property
    def interval(self) -> int:
        """Steps between two searches of a backward order."""

    @property
    def t_f(self) -> float:
        """The share of the steps at which LBC has decided."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. pattern: ``"2:4"``, or empty for the dense network."""

    model: str
    method: str
    pattern: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files: ``resnet32x2-lbc-2of4-seed0``."""
        return "-".join(filter(None, (self.model, self.method, self.pattern.replace(":", "of"), f"seed{self.seed}")))

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def random_search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int, draws: int = 10) -> Tensor:
    """The search of Bi-Mask's code: the best of 10 random orders, never of the one at hand. For the ablation."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    drawn = [torch.randperm(len(order), generator=generator).to(order.device) for _ in range(draws)]
    return max(drawn, key=lambda each: float(kept_importance(importance, each, n, m)))


METHODS: dict[str, Callable[[Options], nm.Method] | None] = {
    "dense": None,
    "magnitude": lambda recipe: nm.Magnitude(),
    "transposable": lambda recipe: Transposable(),
    "srste": lambda recipe: nm.SRSTE(decay=recipe.decay),
    "lbc": lambda recipe: nm.LBC(t_f=recipe.t_f),
    "bimask_random": lambda recipe: nm.BiMask(
        interval=recipe.interval, decay=recipe.decay, objective="count", search=random_search
    ),
    "bimask_identity": lambda recipe: nm.BiMask(interval=recipe.interval, decay=recipe.decay, moves=0),
    "gradual": lambda recipe: nm.Gradual(t_f=recipe.t_f),
    "sste": lambda recipe: nm.SSTE(),
    "lbc_bimask": lambda recipe: nm.LBCBiMask(t_f=recipe.t_f, backward=nm.BiMask(interval=recipe.interval)),
    "bimask": lambda recipe: nm.BiMask(interval=recipe.interval, decay=recipe.decay),
}
LATE = ("magnitude", "transposable")
"""Dense for the first half of the steps, pruned, and trained again with the same schedule: two cosines, one budget (ASP)."""
PATTERNS = ("2:4", "4:8", "1:4", "2:8", "1:16")


def grid(models: Iterable[str], methods: Iterable[str], patterns: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
    """Every combination, the dense network once a seed; seed by seed, so that a table is complete early."""
    methods = list(methods)
    cells = []
    for seed in seeds:
        for model in models:
            cells += [Cell(model, "dense", "", seed)] if "dense" in methods else []
            cells += [Cell(model, method, pattern, seed) for pattern in patterns for method in methods if method != "dense"]
    return cells
