"""Orders of classes of channels that influence each other: block-coordinate ascent over the graph of classes.

A weight keeps N:M groups along its input axis (forward) and, where a backward mask counts, along its output axis after the
forward mask. What an order of its inputs keeps is the same in whatever order its rows come, so forward masks alone leave
classes independent: the graph has no edges, and one pass is all. With backward masks, the inputs' order decides the forward
mask on which the outputs' order is judged: the classes of one weight share an edge. Classes without an edge between them are
searched at once; after each such round the orders that gained are kept, and the classes beside them are looked at again,
until nothing gains.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import networkx as nx

from nm_compiler.solvers.independent import Problem, search_all
from nm_compiler.solvers.search import Found
from nm_compiler.solvers.search_members import Array

Class = TypeVar("Class", bound=Hashable)

_MOST_PASSES = 8
_ENOUGH = 1e-4  # of what is kept: a pass that gains less is the last


class System(Protocol[Class]):  # type: ignore[misc]  # the graph can be read and written
    """What is searched: classes in a state that moves."""

    graph: nx.Graph[Class]
    """Classes as nodes; an edge where an order of one changes what orders of the other keep."""

    def problems(self, each: Class) -> Mapping[Any, Problem]:
        """The searches of a class in the present state: one, or one for every row of its order."""

    def move(self, each: Class, orders: Mapping[Any, Array]) -> float:
        """Take the orders into the state if all that is kept grows. Returns by how much; 0 where it was refused.

        Without edges the search has judged all there is, and any positive number will do.
        """

    def kept(self) -> float:
        """All that is kept in the present state."""


def search_coupled(
    system: System[Class], *, budget_s: float | None = None, numbers: float | None = None, seed: int = 0,
    workers: int | None = None,
) -> dict[tuple[Class, Any], Found]:  # fmt: skip
    """Search all classes until no pass gains, or the budget is spent; the state of ``system`` moves along.

    budget_s, numbers, workers: as in `nm_compiler.solvers.independent.search_all`. Without edges one pass takes the
    whole budget; with them each pass takes half of what the ones before have left (without a budget, seconds each).
    Returns what the first search of every class, and row of its order, found; later passes only add to it.
    """
    first, waiting, stop = dict[tuple[Class, Any], Found](), set(system.graph), threading.Event()
    edges = system.graph.number_of_edges() > 0
    kept, share = system.kept() if edges else 0.0, 0.5 if edges else 1.0
    for turn in range(_MOST_PASSES):
        gained, moved = 0.0, set[Class]()
        for group in _apart(system.graph, waiting):
            part = share * len(group) / len(waiting)
            limits = {"budget_s": None if budget_s is None else part * budget_s, "numbers": numbers and part * numbers}
            found = _round(system, group, seed=seed + turn, workers=workers, stop=stop, **limits)
            for each, results in found.items():
                step = system.move(each, {row: result.order for row, result in results.items() if result.gain > 0})
                gained += step
                if step > 0:
                    moved.add(each)
                for row, result in results.items():
                    first.setdefault((each, row), result)
        waiting, share = {beside for each in moved for beside in system.graph[each]}, share / 2
        if not waiting or stop.is_set() or gained <= _ENOUGH * kept:
            break
    return first


def _round(system: System[Class], group: Sequence[Class], **options: Any) -> dict[Class, dict[Any, Found]]:
    """Search classes that do not influence each other."""
    asked = [(each, row, problem) for each in group for row, problem in system.problems(each).items()]
    found = search_all([problem for _, _, problem in asked], **options)
    result: dict[Class, dict[Any, Found]] = {}
    for (each, row, _), one in zip(asked, found, strict=True):
        result.setdefault(each, {})[row] = one
    return result


def _apart(graph: nx.Graph[Class], classes: set[Class]) -> list[list[Class]]:
    """The classes in groups without an edge inside, large groups first; in the graph's own order, so that runs repeat."""
    part = graph.subgraph(classes)
    colours = nx.greedy_color(nx.Graph(part), strategy="largest_first")
    groups: dict[int, list[Class]] = {}
    for each in graph:
        if each in classes:
            groups.setdefault(colours[each], []).append(each)
    return sorted(groups.values(), key=len, reverse=True)
