"""Orders that let the masks of a model keep the most: what the array solvers are asked, read off the coupled axes.

A class is searched over all weights that it moves at once: of those that reduce over it, the columns lie side by side, a row
for every output channel and tap; where a backward mask counts, those whose outputs it orders are added, forward mask applied.
An order with rows (the same inside no two heads) is one search a row.
Reference: Pool & Yu, NeurIPS 2021, for one class of whole axes, forward and 2:4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from nm_compiler.axes.coordinates import runs
from nm_compiler.axes.reorder import needs_of, reorder
from nm_compiler.axes.result import Axes, AxisClass, leaves
from nm_compiler.errors import NMError
from nm_compiler.importance import Importance, importance_of
from nm_compiler.layout import as_rows
from nm_compiler.pattern import Pattern
from nm_compiler.sites.plan import Plan, Site
from nm_compiler.solvers.coupled import search_coupled
from nm_compiler.solvers.independent import Problem
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.search import Found
from nm_compiler.solvers.search_budget import check_budget
from nm_compiler.solvers.search_members import Member


@dataclass(frozen=True, slots=True)
class Gain:
    """What the order of a class is good for.

    weights: the N:M weights that it moves; before, after: the share of their importance that is kept; size: channels.
    """

    name: str
    size: int
    weights: tuple[str, ...]
    before: float
    after: float

    def __str__(self) -> str:
        more = "s" if len(self.weights) > 1 else ""
        moves = f"{self.size} channels of {len(self.weights)} weight{more}"
        return f"{self.name}: keeps {self.before:.4f} -> {self.after:.4f} ({moves})"


def search_orders(
    model: nn.Module, axes: Axes, plan: Plan, *, seed: int, budget_s: float | None, backward: float = 0.0,
    importance: Importance | None = None, workers: int | None = None,
) -> tuple[dict[str, Tensor], tuple[Gain, ...]]:  # fmt: skip
    """An order, int64 ``[*rows, size]``, for every free class whose N:M groups it can improve, and what each gains.

    plan: which weights are N:M, and with which pattern; budget_s: seconds in all, on all cores; None: seconds' worth of work.
    backward: how much a weight that the backward mask keeps counts beside one that the forward mask keeps.
    importance: what to keep instead of magnitude, see `nm_compiler.importance`. workers: searches at a time, with the weights
    of each in memory; one a core if None. Raises NMError.
    """
    check_budget(budget_s, None, 1)
    if not (isinstance(backward, (int, float)) and 0 <= backward < float("inf")):
        raise NMError(f"backward={backward!r}: how much the backward mask counts beside the forward mask, a number >= 0")
    system = _Model(model, axes, plan, float(backward), importance)
    found = search_coupled(system, budget_s=budget_s, seed=seed, workers=workers)
    moved = {
        name: order
        for name, order in system.orders.items()
        if not torch.equal(order, torch.arange(order.shape[-1]).expand_as(order))
    }
    return moved, tuple(sorted(system.gains(found), key=lambda gain: gain.before - gain.after))


@dataclass(frozen=True, slots=True)
class _Part:
    """Consecutive channels of a weight that a row of an order moves. inputs: along the reduction axis, or the output axis."""

    site: Site
    start: int
    size: int
    inputs: bool

    @property
    def rows(self) -> int:
        """How many rows it adds to the matrix that is searched."""
        axis = self.site.in_axis if self.inputs else self.site.layout.out_axis
        return math.prod(self.site.shape) // self.site.shape[axis]


class _Model:
    """The free classes of a model as a `nm_compiler.solvers.coupled.System`; the model itself is not touched.

    Its state is the orders so far. Weights are put in order when they are looked at, from where they lie, so that an order
    with rows always counts them as they were.
    """

    def __init__(
        self, model: nn.Module, axes: Axes, plan: Plan, backward: float, importance: Importance | None
    ) -> None:  # fmt: skip
        self.orders: dict[str, Tensor] = {}
        self._model, self._axes, self._backward, self._importance = model, axes, backward, importance
        self._sites = {site.name: site for site in plan.sites}
        self._needs = needs_of(axes)
        self._kept: dict[str, float] = {}
        asked = {need for needs in self._needs.values() for need in needs} if backward else set[str]()
        self._parts = {each.name: self._of(each) for each in axes.free if each.name not in asked}
        self.graph: nx.Graph[str] = nx.Graph()
        self.graph.add_nodes_from(name for name, parts in self._parts.items() if parts)
        if backward:
            self.graph.add_edges_from(self._edges())

    def problems(self, each: str) -> dict[int, Problem]:
        """A search for every row of the order that has parts."""
        result = {}
        for row, (pattern, parts) in self._parts[each].items():
            rows = sum(part.rows for part in parts)
            result[row] = Problem(pattern, parts[0].size, rows, partial(self._members, parts))
        return result

    def move(self, each: str, orders: Mapping[int, Any]) -> float:
        """Take the orders of rows in, after those they have; with backward masks only if all weights together keep more."""
        if not orders:
            return 0.0
        size, rows = self._axes[each].size, self._axes[each].rows
        before = self.orders.get(each, torch.arange(size).expand(*rows, size))
        after = before.clone().reshape(-1, size)
        for row, order in orders.items():
            after[row] = after[row][torch.as_tensor(np.asarray(order))]
        trial = {**self.orders, each: after.reshape(before.shape)}
        if not self._backward:  # the search has judged exactly what an order changes
            self.orders = trial
            return float(len(orders))
        touched = [name for name, site in self._sites.items() if each in _classes(self._axes, site)]
        now = {name: self._worth(name, trial) for name in touched}
        gained = sum(now.values()) - sum(self._worth_now(name) for name in touched)
        if gained <= 0:
            return 0.0
        self.orders = trial
        self._kept.update(now)
        return gained

    def kept(self) -> float:
        """What the masks of all weights keep now."""
        return sum(self._worth_now(name) for name in self._sites)

    def gains(self, found: Mapping[tuple[str, int], Found]) -> Iterator[Gain]:
        """By class, over the rows of its order; where backward masks count, as it stands after the last pass."""
        for name in self.graph:
            before = after = total = 0.0
            for row, problem in self.problems(name).items():
                one = found[name, row]
                total += one.total
                before += one.share * one.total
                after += problem.search(moves=0).share * one.total if self._backward else one.share * one.total + one.gained
            if total:
                parts = [part for _, parts in self._parts[name].values() for part in parts]
                weights = tuple(dict.fromkeys(part.site.name for part in parts))
                yield Gain(name, self._axes[name].size, weights, before / total, after / total)

    def _of(self, each: AxisClass) -> dict[int, tuple[Pattern, list[_Part]]]:
        """By row of the order: the pattern, and the parts that have it. Of several patterns the one with most weights."""
        found: dict[int, dict[Pattern, list[_Part]]] = {}
        for inputs, members in ((True, each.of("in")), (False, each.of("out") if self._backward else ())):
            for member in dict.fromkeys(members):
                site = self._sites.get(member.name)
                if site is None or not (inputs or site.backward_groups):
                    continue
                m = site.pattern.m
                for run in runs(self._axes.state[member.name][member.axis], each.name, each.needs, each.rows):
                    if run.start % m == 0 and each.size % m == 0:  # else groups reach into what lies beside the run
                        part = _Part(site, run.start, each.size, inputs)
                        found.setdefault(run.row, {}).setdefault(site.pattern, []).append(part)
        return {
            row: max(by_pattern.items(), key=lambda item: sum(part.rows for part in item[1]))
            for row, by_pattern in found.items()
        }

    def _edges(self) -> Iterator[tuple[str, str]]:
        for site in self._sites.values():
            layout = self._axes.state[site.name]
            inputs, outputs = ([leaf.name for leaf in leaves(layout[axis])] for axis in (site.in_axis, site.layout.out_axis))
            for one in inputs:
                yield from ((one, other) for other in outputs if other != one and {one, other} <= set(self.graph))

    def _members(self, parts: Sequence[_Part]) -> list[Member]:
        return [self._member(part) for part in parts]

    def _member(self, part: _Part) -> Member:
        viewed = as_rows(self._values(part.site.name, self.orders if self._backward else {}), part.site.rows)
        if part.inputs:
            return Member(viewed.flatten(0, -2)[:, part.start : part.start + part.size])
        outputs = viewed.movedim(len(part.site.layout.batch), 0)[part.start : part.start + part.size]
        return Member(outputs, "output", weight=self._backward)

    def _values(self, name: str, orders: Mapping[str, Tensor]) -> Tensor:
        values = importance_of(self._importance, self._sites[name], self._model.get_parameter(name))
        return reorder(values.float().cpu(), self._axes.state[name], orders, self._needs)

    def _worth_now(self, name: str) -> float:
        if name not in self._kept:
            self._kept[name] = self._worth(name, self.orders)
        return self._kept[name]

    def _worth(self, name: str, orders: Mapping[str, Tensor]) -> float:
        """What both masks of a weight keep, the backward mask at its weight."""
        site = self._sites[name]
        n, m = site.pattern.n, site.pattern.m
        values = self._values(name, orders)
        kept = values * magnitude_mask(values, n, m, site.in_axis)
        total = float(kept.sum(dtype=torch.float64))
        if site.backward_groups:
            both = kept * magnitude_mask(kept, n, m, site.layout.out_axis)
            total += self._backward * float(both.sum(dtype=torch.float64))
        return total


def _classes(axes: Axes, site: Site) -> set[str]:
    return {leaf.name for axis in axes.state[site.name] for leaf in leaves(axis)}
