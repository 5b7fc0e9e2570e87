"""LBC, learning best combinations (Zhang et al., NeurIPS 2022): training starts dense, combinations retire for good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass
from nm_compiler.layout import as_rows
from nm_compiler.methods.base import Clock, Method
from nm_compiler.methods.decline import check_decline, left, window
from nm_compiler.passes.insert_scores import insert_scores, table_of
from nm_compiler.pattern import MAX_TABLE, combination_table
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.combinations import count, pack, retire
from nm_compiler.solvers.live import retire as retire_packed
from nm_compiler.state.beside import Weight

_HALF = (torch.bfloat16, torch.float16)  # beside 1 / C a step would round away there, and only differences count


@dataclass(frozen=True, slots=True)
class LBC(Method):
    """Learn which combination of every group to keep.

    A group starts with all C = C(M, N) combinations live and so with every weight in use. Between ``t_i`` and ``t_f``
    (shares of the training steps) the lowest-scored ones retire, ``1 + ceil((C - 1) (1 - tau)^power)`` stay; at ``t_f`` one
    is left, the mask is exactly N:M, and the scores stop training. Ref: LBC, eq. 6 to 8.

    scores: ``"position"`` keeps one score a weight, so a group costs M numbers and ceil(C / 8) bytes (2:4: one byte);
    it is the paper's method exactly under SGD with any momentum and weight decay, and differs under Adam-like
    optimizers or when gradient-norm clipping includes the scores. ``"combination"`` keeps the paper's C scores a group
    (2:4: 6, 4:8: 70) and C bytes. Where C > 1820, "position" retires positions instead of combinations.
    power: 3, the papers' cubic; their code for transformers has 4.
    Where no gradient reaches the scores of a weight (it runs under ``torch.no_grad()``, or not at all), they stay equal, and
    combinations retire by the magnitudes of its weights instead.
    Raises NMError unless ``0 <= t_i < t_f <= 1`` and power is a whole number from 1 to 8.
    """

    scores: Literal["position", "combination"] = "position"
    t_i: float = 0.0
    t_f: float = 0.5
    power: int = 3

    def __post_init__(self) -> None:
        if self.scores not in ("position", "combination"):
            raise NMError(f"{self.name}(scores={self.scores!r}): choose 'position' or 'combination'")
        check_decline(self.name, self.t_i, self.t_f, self.power)

    @property
    def by_position(self) -> bool:
        """Whether a score belongs to a weight rather than to a combination."""
        return self.scores == "position"

    def layout(self) -> Mapping[str, Any]:
        return {"method": self.name, "scores": self.scores}

    def check(self, site: Site) -> None:
        if not self.by_position and not site.pattern.has_table:
            raise NMError(
                f"{site.name} of shape {list(site.shape)}: {site.pattern} has {site.pattern.combinations} combinations "
                f"a group, more than the {MAX_TABLE} that LBC(scores='combination') can hold; use scores='position'"
            )

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [partial(insert_scores, sites=sites, by_position=self.by_position)]

    def constants(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        makers = dict(table_of(site.pattern, self.by_position) for site in sites)
        return {name: make() for name, make in makers.items()}

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        pattern = site.pattern
        start = 0.0 if weight.dtype in _HALF else 1 / math.comb(pattern.m - 1, pattern.n - 1)
        if self.by_position:
            scores = torch.full_like(weight, start / pattern.n)
        else:
            scores = weight.new_full((*site.leading, site.groups_per_row, pattern.combinations), start)
        return {"scores": nn.Parameter(scores.detach()), "live": self._all_live(site).to(weight.device)}

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return ("scores", "live")

    def is_packed(self, site: Site) -> bool:
        """Whether a live set is one bit an entry."""
        return self.by_position and site.pattern.has_table

    def live(self, weight: Weight) -> float:
        return float(self._count(weight).double().mean())

    def remark(self, weight: Weight) -> str | None:
        if not self.is_settled(weight):
            return "training: combinations are still live"
        return "kept by magnitude: its scores never moved" if _are_equal(weight.read("scores")) else None

    def _count(self, weight: Weight) -> Tensor:
        return count(weight.read("live"), packed=self.is_packed(weight.site))

    def _all_live(self, site: Site) -> Tensor:
        entry = self._one_live(site)
        return entry.expand(*site.leading, site.groups_per_row, -1).contiguous()

    def _one_live(self, site: Site) -> Tensor:
        """The live set of one group with nothing retired."""
        ones = torch.ones(_entries(site), dtype=torch.uint8)
        return pack(ones) if self.is_packed(site) else ones

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        live = state["live"]
        packed = self.is_packed(site)
        counts, most = count(live, packed=packed), int(live.max())
        least, largest = int(counts.min()), int(counts.max())
        if least < _last(site):
            return f"a group has {least} live entries, at least {_last(site)} must stay"
        if (not packed and most > 1) or bool((live & ~self._one_live(site).to(live.device)).any()):
            return "a live entry is set that this pattern does not have"
        if largest != least:
            return f"groups have {least} to {largest} live entries, and the schedule leaves as many in each"
        return None

    def begin(self, weights: Sequence[Weight], clock: Clock) -> None:
        early, parallel = clock.step < self.window(clock.total)[1], torch.distributed.is_initialized()
        for weight in weights:
            scores = weight["scores"]
            learning = early or (parallel and scores.requires_grad)
            if scores.dtype in _HALF and not scores.is_meta and _are_equal(weight.read("scores")):  # cast after nm.compile
                weight.write("scores", torch.zeros_like(weight.read("scores")))
            if scores.requires_grad != learning:  # under DDP the flag must stay: its reducer counts on every gradient
                scores.requires_grad_(learning)
                scores.grad = None

    def advance(self, weights: Sequence[Weight], clock: Clock) -> None:
        for weight in weights:
            keep = self.live_count(weight.site, clock.step, clock.total)
            if keep < self.live_count(weight.site, clock.step - 1, clock.total):
                self._retire(weight, keep)
        if clock.step == self.window(clock.total)[1]:
            self.begin(weights, clock)

    def catch_up(self, weights: Sequence[Weight], clock: Clock) -> None:
        for weight in weights:
            keep = self.live_count(weight.site, clock.step, clock.total)
            if bool((self._count(weight) > keep).any()):
                self._retire(weight, keep)
        self.begin(weights, clock)

    def window(self, total: int) -> tuple[int, int]:
        """The steps at which retiring begins and at which one combination is left."""
        return window(self.t_i, self.t_f, total)

    def live_count(self, site: Site, step: int, total: int) -> int:
        """Live entries of a group after ``step`` of ``total`` steps."""
        return left(step, self.window(total), self.power, entries=_entries(site), last=_last(site))

    def forward_mask(self, weight: Weight) -> Tensor:
        """1 where some live combination covers the position: bool of the weight's shape."""
        site, live = weight.site, weight.read("live")
        table = table_of(site.pattern, self.by_position)[1]().to(live.device)
        mask: Tensor = torch.ops.nm.live_mask(live, table, list(site.shape), site.rows)
        return mask

    def is_settled(self, weight: Weight) -> bool:
        return bool((self._count(weight) == _last(weight.site)).all())

    def settle(self, weight: Weight) -> None:
        self._retire(weight, _last(weight.site))

    def _retire(self, weight: Weight, keep: int) -> None:
        site, scores, live = weight.site, weight.read("scores"), weight.read("live")
        pattern, by_position = site.pattern, self.by_position
        if _are_equal(scores):  # no gradient has reached them: a weight of a frozen part, or one that training does not use
            scores, by_position = weight.value.abs(), True
        table = combination_table(pattern) if pattern.has_table else torch.eye(pattern.m, dtype=torch.uint8)
        rows = as_rows(scores, site.rows) if by_position else scores
        kept = retire_packed(rows, live, pattern, keep) if self.is_packed(site) else None
        if kept is not None:
            weight.write("live", kept)
            return
        wide = rows if rows.dtype == torch.float64 else rows.float()
        weight.write("live", retire(wide, live, table.to(live.device), keep=keep, by_position=by_position))


def _are_equal(scores: Tensor) -> bool:
    """Whether all are as they were made; most weights show by their first row that they are not."""
    first = scores[0].reshape(-1)[0]
    return bool((scores[0] == first).all()) and bool((scores == first).all())


def _entries(site: Site) -> int:
    return site.pattern.combinations if site.pattern.has_table else site.pattern.m


def _last(site: Site) -> int:
    return 1 if site.pattern.has_table else site.pattern.n
