"""One small rule per op: how the axes of its result come from those of its inputs.

A rule is a function of the analysis and the call. It unifies what must be permuted alike, pins what must keep its order, and
returns the terms of the result. An op whose result depends on neighbours along an axis says so with ``mixed``.

elementwise  entry i meets entry i
creation     new tensors
layout       axes moved, cut and merged
parts        axes taken apart and put together
products     one axis of each input is summed over
algebra      other products: outer, over several axes, of a diagonal
losses       elementwise, then kept or summed
norms        scaled by a sum over a run of entries
reductions   axes that go
indexing     look-ups, sorting, top-k
spatial      what slides over positions
subgraphs    ops that run a subgraph
"""

from __future__ import annotations

from nm_compiler.axes.analysis import Rule
from nm_compiler.axes.rules import (
    algebra,
    creation,
    elementwise,
    indexing,
    layout,
    losses,
    norms,
    parts,
    products,
    reductions,
    spatial,
    subgraphs,
)

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **creation.RULES,
    **layout.RULES,
    **parts.RULES,
    **products.RULES,
    **algebra.RULES,
    **losses.RULES,
    **norms.RULES,
    **reductions.RULES,
    **indexing.RULES,
    **spatial.RULES,
    **subgraphs.RULES,
}
