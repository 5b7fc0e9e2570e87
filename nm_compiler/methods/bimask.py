"""Bi-Mask, bi-directional masks (Zhang, Luo et al., ICML 2023): N:M in the forward product and in the input gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass
from nm_compiler.layout import as_rows
from nm_compiler.methods.base import Clock, Method
from nm_compiler.methods.srste import check_decay, check_rate, pull
from nm_compiler.passes.insert_bimask import insert_bimask
from nm_compiler.passes.insert_srste import insert_srste
from nm_compiler.passes.train_cusparselt import reasons_of, train_cusparselt
from nm_compiler.runtime.cusparselt.eligible import machine_of, of_machine
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.backward_order import OrderSearch, quick_search, search_all, together
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.masks import on_gpu, top_mask
from nm_compiler.solvers.order_launch import Problem
from nm_compiler.state.beside import Weight


@dataclass(frozen=True, slots=True)
class BiMask(Method):
    """SR-STE forward, and an input gradient through a weight that is N:M along the output channels as well.

    The backward mask B is a subset of the forward mask F: the N largest of every M output channels of W * F, taken in an
    order that is searched again every ``interval`` steps so that B keeps as much of F as it can. Identity and the current
    order are always candidates. A weight whose output channels do not divide by M keeps B = F. Ref: Bi-Mask, eq. 8 to 10.

    interval: optimizer steps between searches (first search after step 1); decay: lambda, 2e-4;
    moves: output channels placed anew in a search, for each weight; objective: ``"magnitude"`` keeps the most of sum |W * F|,
    ``"count"`` the most non-zeros (the paper's); search: any `OrderSearch`;
    decoupled: as in `SRSTE`.
    fold: put an order into the weights instead, once, at `compile`, which then searches the channels of coupled layers for
    both masks together (``permute="search"``): backward groups lie side by side, there is no order to store, to gather with
    or to search again, and channels that are not free keep the order they have.
    products: ``"cusparselt"`` runs y and dx of whole linears on the sparse tensor cores of an NVIDIA GPU, in float16 or
    bfloat16 (autocast too), wherever there are ``min_tokens`` tokens or more: packing both weights in every step has to pay.
    All other products stay masked and dense, and `nm_compiler.report` says why. Where the library packs, a step lost on an
    H200 to what masks and packing cost; our own kernels for both have not run there yet: see docs/cusparselt.md.
    Raises NMError for values out of range.
    """

    interval: int = 100
    decay: float = 2e-4
    moves: int = 10_000
    objective: Literal["magnitude", "count"] = "magnitude"
    search: OrderSearch = quick_search
    decoupled: bool = False
    fold: bool = False
    products: Literal["dense", "cusparselt"] = "dense"
    min_tokens: int = 16_384

    def __post_init__(self) -> None:
        check_decay(self.decay, self.name)
        whole = isinstance(self.interval, int) and isinstance(self.moves, int)
        if not whole or self.interval < 1 or self.moves < 0:
            given = f"interval={self.interval!r}, moves={self.moves!r}"
            raise NMError(f"BiMask({given}): needs whole numbers, interval >= 1 and moves >= 0")
        if self.objective not in ("magnitude", "count"):
            raise NMError(f"BiMask(objective={self.objective!r}): choose 'magnitude' or 'count'")
        if self.products not in ("dense", "cusparselt"):
            raise NMError(f"BiMask(products={self.products!r}): choose 'dense' or 'cusparselt'")
        if not isinstance(self.min_tokens, int) or self.min_tokens < 1:
            raise NMError(f"BiMask(min_tokens={self.min_tokens!r}): needs a whole number >= 1")

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [
            partial(insert_srste, sites=sites, decay=0.0 if self.decoupled else self.decay),
            partial(insert_bimask, sites=sites, folded=self.fold),
            *([partial(train_cusparselt, sites=sites, min_tokens=self.min_tokens)] if self.products == "cusparselt" else []),
        ]

    def layout(self) -> Mapping[str, Any]:
        return {"method": self.name, **({"fold": True} if self.fold else {})}

    @property
    def backward_share(self) -> float:
        return float(self.fold)

    @property
    def folds(self) -> bool:
        return self.fold

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        if not self.suffixes(site):
            return {}
        return {"order": torch.arange(site.out, device=weight.device).expand(site.leading).contiguous()}

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return ("order",) if site.backward_groups and not self.fold else ()

    def remark(self, weight: Weight) -> str | None:
        site = weight.site
        if site.backward_groups:
            return self._runs_on(weight) if self.products == "cusparselt" else None
        inside = " in each conv group" * (site.conv_groups > 1) or " in each slice that a product reads" * (site.blocks > 1)
        return f"backward mask = forward mask: {site.block} output channels{inside}, not a multiple of {site.pattern.m}"

    def _runs_on(self, weight: Weight) -> str:
        why = next(chain(reasons_of(weight.site), of_machine(machine_of(weight.param.device))), None)
        if why is not None:
            return f"masked dense products: {why}"
        return f"cuSPARSELt products from {self.min_tokens} tokens on, in float16 or bfloat16"

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        if "order" not in state:
            return None
        order = state["order"].cpu().unflatten(-1, (site.blocks, site.block))
        inside = order - torch.arange(0, site.out, site.block).unsqueeze(-1)
        if not torch.equal(inside.sort(-1).values, torch.arange(site.block).expand_as(order)):
            where = " within each conv group" * (site.conv_groups > 1) or " within each slice" * (site.blocks > 1)
            return f"the order is not a permutation of its output channels{where}"
        return None

    def begin(self, weights: Sequence[Weight], clock: Clock) -> None:
        check_rate(clock, self)

    def advance(self, weights: Sequence[Weight], clock: Clock) -> None:
        if self.decoupled:
            pull(weights, clock, self.decay)
        self.search_orders(weights, clock, _largest)

    def search_orders(self, weights: Sequence[Weight], clock: Clock, forward_mask: Callable[[Weight], Tensor]) -> None:
        """Search anew if it is time to. forward_mask: F of a weight, bool of its shape."""
        if (clock.step - 1) % self.interval == 0:
            ordered = [
                (each, clock.seed + 7919 * clock.step + at) for at, each in enumerate(weights) if self.suffixes(each.site)
            ]
            for some in _at_once(ordered, self.search):
                self._refresh(some, forward_mask)

    def _refresh(self, some: Sequence[tuple[Weight, int]], forward_mask: Callable[[Weight], Tensor]) -> None:
        """Search the orders of some weights with their seeds."""
        orders, problems = [], []
        for weight, seed in some:
            order, value = weight.read("order"), weight.value
            mask = forward_mask(weight)  # on all ranks, which may have to gather
            orders.append(order)
            if _rank() == 0:
                problems.append(self._problems(weight.site, value, mask, order, seed))
        if problems:
            found = iter(search_all(self.search, list(chain.from_iterable(problems)), moves=self.moves))
            for at, ((weight, _), parts) in enumerate(zip(some, problems, strict=True)):
                local = torch.stack(list(islice(found, len(parts))))
                orders[at] = (local + _starts(weight.site, local)).view_as(orders[at])
        for (weight, _), order in zip(some, orders, strict=True):
            if torch.distributed.is_initialized():  # one search for all ranks, so that masks agree to the bit
                torch.distributed.broadcast(order, 0)
            weight.write("order", order)

    def _problems(self, site: Site, weight: Tensor, mask: Tensor, order: Tensor, seed: int) -> list[Problem]:
        """One for each part of the weight that has an order of its own: experts, conv groups, slices."""
        n, m = site.pattern.n, site.pattern.m
        importance = mask.to(weight.dtype) if self.objective == "count" else weight.abs() * mask
        rows = as_rows(importance, site.rows).reshape(-1, site.block, math.prod(site.shape) // math.prod(site.leading))
        local = order.reshape(-1, site.block)
        local = local - _starts(site, local)
        return [Problem(part, one, n, m, seed) for part, one in zip(rows, local, strict=True)]


def _at_once(weights: Sequence[tuple[Weight, int]], search: OrderSearch) -> Iterator[Sequence[tuple[Weight, int]]]:
    """Cut into runs that `search_all` gets at once, the same on all ranks."""
    some: list[tuple[Weight, int]] = []
    size = 0
    for weight, seed in weights:
        numbers, param = math.prod(weight.site.shape), weight.param
        if some and (size + numbers > together(search, param) or param.device != some[0][0].param.device):
            yield some
            some, size = [], 0
        some.append((weight, seed))
        size += numbers
    if some:
        yield some


def _starts(site: Site, local: Tensor) -> Tensor:
    """The first output channel of each part, ``[parts, 1]``. local: ``[parts, block]``."""
    starts = torch.arange(0, site.out, site.block, device=local.device)
    return starts.repeat(len(local) // site.blocks).unsqueeze(-1)


def _largest(weight: Weight) -> Tensor:
    value, site = weight.value, weight.site
    if on_gpu(value):
        with torch.cuda.device_of(value):
            return top_mask(value, pattern=site.pattern, axis=site.in_axis)
    return magnitude_mask(value, site.pattern.n, site.pattern.m, site.in_axis)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
