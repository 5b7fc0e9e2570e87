"""Coupled axes as a networkx graph, for whoever wants to walk it.

(weight) --outputs--> [class] --inputs--> (weight)
"""

from __future__ import annotations

import networkx as nx

from nm_compiler.axes.result import Axes


def network(axes: Axes) -> nx.DiGraph:
    """Weights (``kind="weight"``, by name) and classes (``kind="class"``, by ``("class", name)``), in the direction of data.

    A class node has its ``size`` and ``pinned``, the reason or None. What neither makes nor reads channels is left out.
    """
    graph = nx.DiGraph()
    for each in axes.classes:
        makers, readers = ({member.name for member in each.of(role)} for role in ("out", "in"))
        if makers | readers:
            graph.add_node(("class", each.name), kind="class", size=each.size, pinned=each.pinned)
            graph.add_nodes_from(sorted(makers | readers), kind="weight")
            graph.add_edges_from((name, ("class", each.name)) for name in sorted(makers))
            graph.add_edges_from((("class", each.name), name) for name in sorted(readers))
    return graph
