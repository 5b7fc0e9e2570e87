"""LBC: retirement for good, beside that of the released code, where a score of zero means retired.

There the optimizer moves the scores of retired combinations off zero by the momentum that they have left, and the choice of
the lowest scores is made anew before every step among all: what was retired can come back. Schedule, data, first weights,
optimizer and everything else are the same here. The released layer rounds and breaks ties in its own way, so it also runs
with the one change that what was retired is put back to zero before the next choice: beside that, only this differs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from published import PublishedLBC, replace
from torch import Tensor, nn

import nm_compiler as nm
from ablations.digits import Training, network
from nm_compiler.demo.train import accuracy
from nm_compiler.pattern import combination_table

VARIANTS = ("for good", "released layer, for good", "as released")
LESS = 0.05


class Flips:
    """Counts what happens to live sets and masks from step to step."""

    def __init__(self) -> None:
        self._live: dict[str, Tensor] = {}
        self._mask: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}
        self.revived = self.restored = self.removed = 0
        self.lowest = torch.inf

    def see(self, name: str, live: Tensor, mask: Tensor, scores: Tensor) -> None:
        """Of a weight in the forward pass to come: live and scores ``[groups, C]``, mask ``[groups, M]``."""
        self.lowest = min(self.lowest, float(scores[live].min()))
        if name in self._live:
            self.revived += int((live & ~self._live[name]).sum())
            self.restored += int((mask & ~self._mask[name]).sum())
            self.removed += int((self._mask[name] & ~mask).sum())
        self._ever[name] = self._ever.get(name, torch.zeros_like(live)) | ~live
        self._live[name], self._mask[name] = live, mask

    def as_json(self) -> dict[str, float]:
        """revived: combinations that came back; restored, removed: mask entries that went from 0 to 1 and from 1 to 0; each
        for a hundred groups. returned_won: the share of groups whose last combination had been retired before. lowest: the
        lowest score that a live combination ever had; as long as it is positive, what was retired (near zero) cannot win.
        """
        groups = sum(len(live) for live in self._live.values())
        won = sum(int((self._live[name] & self._ever[name]).any(1).sum()) for name in self._live)
        return {
            "revived": 100 * self.revived / groups,
            "restored": 100 * self.restored / groups,
            "removed": 100 * self.removed / groups,
            "returned_won": won / groups,
            "lowest": self.lowest,
        }


def measure(training: Training, variant: str, pattern: str, start: float, seed: int) -> dict[str, Any]:
    """One training, the scores decided at half of the steps.

    start: of the scores, beside the paper's 1 / C(M-1, N-1). Masks and rankings do not depend on it, but for the decay; it
    stands for what weight decay does to scores in a training of many more steps.
    """
    model = network(seed)
    method = nm.LBC(scores="combination")
    sparse = nm.compile(model, (training.example,), pattern=pattern, method=method, seed=seed)
    for weight in sparse.weights:
        weight["scores"].data.mul_(start)
    if variant == "for good":
        flips, frozen = _ours(training, sparse, seed)
    else:
        flips, frozen = _released(training, sparse, seed, start, for_good="for good" in variant)
    return {**flips.as_json(), "accuracy": accuracy(frozen, training.data)}


def _ours(training: Training, sparse: nm.SparseModule, seed: int) -> tuple[Flips, nn.Module]:
    scheduler, flips = nm.SparsityScheduler(sparse, training.steps), Flips()

    def before(step: int) -> None:
        for weight in sparse.weights:
            live = weight["live"].flatten(0, -2).bool()
            scores = weight["scores"].detach().flatten(0, -2)
            flips.see(weight.site.name, live, _covered(live, weight.site.pattern), scores)

    training.run(sparse, seed, before=before, after=lambda step: scheduler.step())
    before(training.steps)
    return flips, nm.freeze(sparse)


def _released(
    training: Training, sparse: nm.SparseModule, seed: int, start: float, *, for_good: bool
) -> tuple[Flips, nn.Module]:
    """The same weights and the same schedule, with the released layers. Decided scores stop training, as there."""
    method, sites, flips = cast(nm.LBC, sparse.method), sparse.plan.sites, Flips()
    end = method.window(training.steps)[1]
    model = network(seed)
    made = replace(model, [site.name for site in sites], lambda layer: PublishedLBC(layer, *_nm(sites[0].pattern)))
    layers = [cast(PublishedLBC, layer) for layer in made]
    retired: dict[str, Tensor] = {}
    for layer in layers:
        layer.scores.data.mul_(start)

    def before(step: int) -> None:
        for site, layer in zip(sites, layers, strict=True):
            if step <= end:
                if for_good and step:
                    layer.scores.data[retired[site.name]] = 0.0
                layer.remove(site.pattern.combinations - method.live_count(site, step, training.steps))
            if step == end:
                layer.scores.requires_grad_(False)
            live = layer.scores.detach() != 0
            retired[site.name] = ~live
            flips.see(site.name, live, _covered(live, site.pattern), layer.scores.detach())

    training.run(model, seed, before=before, after=lambda step: None)
    before(training.steps)
    for layer in layers:
        with torch.no_grad():
            layer.layer.weight.copy_(layer.masked_weight())
    found = nm.verify(model, sites[0].pattern).satisfied
    assert all(1 in found[site.name.replace(".weight", ".layer.weight")] for site in sites)
    return flips, model


def _nm(pattern: nm.Pattern) -> tuple[int, int]:
    return pattern.n, pattern.m


def _covered(live: Tensor, pattern: nm.Pattern) -> Tensor:
    return (live.float() @ combination_table(pattern).float()) > 0
