"""Orders that let the forward masks of a model keep the most magnitude.

A class is searched over all weights that reduce over it at once: their columns side by side, one row for every output channel
and tap. Orders of output channels leave the groups of a weight as they are, so classes do not interact and one pass is enough.
Reference: Pool & Yu, NeurIPS 2021, for one class of whole axes and 2:4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nm_compiler.axes.coordinates import runs
from nm_compiler.axes.result import Axes, AxisClass
from nm_compiler.layout import as_rows
from nm_compiler.pattern import Pattern
from nm_compiler.sites import Plan, Site
from nm_compiler.solvers.search import search_order

Matrix = NDArray[np.float32]


def search_orders(model: nn.Module, axes: Axes, plan: Plan, *, seed: int, budget_s: float | None) -> dict[str, Tensor]:
    """An order, int64 ``[*rows, size]``, for every free class whose N:M groups it can improve.

    plan: which weights are N:M, and with which pattern; budget_s: seconds in all, shared by size; None: a moderate search.
    """
    sites = {site.name: site for site in plan.sites}
    problems = [(each, row, site, found) for each in axes.free for row, site, found in _problems(model, axes, each, sites)]
    cost = [len(found) * each.size * each.size for each, _, _, found in problems]
    orders: dict[str, Tensor] = {}
    for (each, row, pattern, columns), share in zip(problems, cost, strict=True):
        budget = None if budget_s is None else budget_s * share / sum(cost)
        order = search_order(np.concatenate(columns), pattern=pattern, budget_s=budget, seed=seed)
        identity = torch.arange(each.size).expand(*each.rows, each.size)
        orders.setdefault(each.name, identity.clone()).view(-1, each.size)[row] = torch.as_tensor(np.asarray(order))
    return {
        name: order for name, order in orders.items() if not torch.equal(order, torch.arange(order.shape[-1]).expand_as(order))
    }


def _problems(
    model: nn.Module, axes: Axes, each: AxisClass, sites: Mapping[str, Site]
) -> Iterator[tuple[int, Pattern, list[Matrix]]]:
    """Per row of a class's order: the pattern, and the columns of all N:M weights that it moves."""
    found: dict[tuple[int, Pattern], list[Matrix]] = {}
    for member in dict.fromkeys(each.of("in")):
        site = sites.get(member.name)
        if site is None:
            continue
        m = site.pattern.m
        columns: Matrix | None = None
        for run in runs(axes.state[member.name][member.axis], each.name, each.needs, each.rows):
            if run.start % m or each.size % m:
                continue  # groups reach into what lies beside the run
            if columns is None:
                weight = as_rows(model.get_parameter(member.name).detach().abs(), site.rows)
                columns = weight.reshape(-1, weight.shape[-1]).float().cpu().numpy()
            found.setdefault((run.row, site.pattern), []).append(columns[:, run.start : run.start + each.size])
    best: dict[int, tuple[Pattern, list[Matrix]]] = {}
    for (row, pattern), matrices in found.items():  # mixed patterns: the one with more to gain decides
        if row not in best or sum(map(np.size, matrices)) > sum(map(np.size, best[row][1])):
            best[row] = (pattern, matrices)
    for row, (pattern, matrices) in best.items():
        yield row, pattern, matrices
