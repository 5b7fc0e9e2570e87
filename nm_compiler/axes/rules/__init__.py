"""One small rule per op: how the axes of its result come from those of its inputs.

A rule is a function of the analysis and the call. It unifies what must be permuted alike, pins what must keep its order, and
returns the terms of the result. An op whose result depends on neighbours along an axis says so with ``mixed``.
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
