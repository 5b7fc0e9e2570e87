"""Write an einsum of data with one weight as `aten.linear`, for which runtimes have sparse kernels.

    before                                                        after
    %w = self.proj    # [heads, dim, width], N:M along dim        %w = self.proj_matrix    # [heads * width, dim]
    %y = aten.einsum("btd,hdk->bhtk", [%x, %w])                   %p = aten.linear(%x, %w)
                                                                  %h = aten.unflatten(%p, -1, [heads, width])
                                                                  %y = aten.permute(%h, [0, 2, 1, 3])

Only where each axis of the weight is either summed over or an axis of the result, which the experts of a mixture are not. Of
several axes that are summed over the last one of the weight is the last one of the matrix: groups run along it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import is_constant, value_of
from nm_compiler.rewrite import constant, discard, unused, weight_of
from nm_compiler.sites.equations import EINSUM, Equation, equation_of

aten = torch.ops.aten


def einsum_to_linear(gm: GraphModule, *, own: bool = False) -> GraphModule:
    """Rewrite every einsum that is a linear of a planned weight.

    own: the graph's state belongs to nobody else, so that what was laid out anew is let go as soon as nothing reads it.
    """
    for node in [node for node in gm.graph.nodes if node.target is EINSUM]:
        equation = equation_of(node)
        roles = None if isinstance(equation, str) else _roles(equation)
        if roles is not None:
            with gm.graph.inserting_before(node):
                new = _linear(gm, roles)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            discard(gm, node, own=own)
    return gm


@dataclass(frozen=True)
class _Roles:
    """Who is who. data, weight, out: their axes, a letter each; summed, kept: those of the weight, in its order."""

    x: Node
    w: Node
    data: str
    weight: str
    summed: str
    kept: str
    out: str

    @property
    def others(self) -> str:
        """Axes of the data that are not summed over."""
        return "".join(letter for letter in self.data if letter not in self.summed)


def _roles(equation: Equation) -> _Roles | None:
    """None if it is no linear of data with a planned weight."""
    first, _ = equation.operands
    side = 0 if is_constant(first) else 1
    x, w = equation.operands[1 - side], equation.operands[side]
    if is_constant(x) or not is_constant(w) or weight_of(w) is None:
        return None
    data, weight, out = equation.terms[1 - side], equation.terms[side], equation.out
    summed = "".join(letter for letter in weight if letter in data and letter not in out)
    kept = "".join(letter for letter in weight if letter in out and letter not in data)
    found = _Roles(x, w, data, weight, summed, kept, out)
    whole = len(summed + kept) == len(weight) and sorted(found.others + kept) == sorted(out)
    known = len(summed) == 1 or w.op == "get_attr"  # a view of it may lie in memory in another order
    return found if whole and known and summed and kept else None


def _linear(gm: GraphModule, roles: _Roles) -> Node:
    value = value_of(gm, roles.w).detach().permute(_places(roles.kept + roles.summed, roles.weight))
    sizes = list(value.shape)
    rows, columns = sizes[: len(roles.kept)], sizes[len(roles.kept) :]
    name = unused(gm, f"{str(weight_of(roles.w)).replace('.', '_')}_matrix")
    matrix = constant(gm, name, value.reshape(math.prod(rows), math.prod(columns)).contiguous())
    matrix.meta["weight"] = weight_of(roles.w)
    data = _permuted(gm, roles.x, _places(roles.others + roles.summed, roles.data))
    if len(columns) > 1:
        data = gm.graph.call_function(aten.flatten.using_ints, (data, len(roles.others), -1))
    result = gm.graph.call_function(aten.linear.default, (data, matrix))
    if len(rows) > 1:
        result = gm.graph.call_function(aten.unflatten.int, (result, -1, rows))
    return _permuted(gm, result, _places(roles.out, roles.others + roles.kept))


def _places(wanted: str, given: str) -> list[int]:
    return [given.index(letter) for letter in wanted]


def _permuted(gm: GraphModule, data: Node, places: Sequence[int]) -> Node:
    if list(places) == list(range(len(places))):
        return data
    return gm.graph.call_function(aten.permute.default, (data, list(places)))
