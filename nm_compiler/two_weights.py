"""Products with two weights: W * F makes the output, W * B sends the gradient of the output back to the input.

What `nm_compiler.passes.insert_bimask` and `insert_backward_op` share; the graph before and after is at the top of the former.
Safe because the output does not read the second weight: only the gradient of the product's input changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from nm_compiler.graph import arguments_of, per_axis, target_name
from nm_compiler.ops import einsum as _einsum  # noqa: F401  registers nm::einsum, and so on
from nm_compiler.ops import grouped_mm as _grouped_mm  # noqa: F401
from nm_compiler.ops import products as _products  # noqa: F401
from nm_compiler.rewrite import call, following, masked_nodes, replace
from nm_compiler.sites.equations import Equation, equation_of
from nm_compiler.sites.plan import Site
from nm_compiler.sites.uses import CONVS, GROUPED, Use, uses
from nm_compiler.sites.views import is_rounding, is_scale, is_sum

aten = torch.ops.aten
nm = torch.ops.nm


def give_second(gm: GraphModule, site: Site, fixed: Collection[Node], build: Callable[[Node], Node]) -> None:
    """Give every product of a site a second weight: what ``build`` makes of the node that stands for the first one.

    fixed: `nm_compiler.sites.uses.constants` of the graph as it was before the pass. Views between are repeated for the
    second.
    """
    for forward in masked_nodes(gm, site.name):
        products = [use for use in uses(forward, fixed) if isinstance(use, Use)]
        seen = {forward: build(forward)}
        for use in products:
            _replace(gm, use, seen)


def _replace(gm: GraphModule, use: Use, seen: dict[Node, Node]) -> None:
    node, view = use.node, use.path[-1]
    for before, after in pairwise(use.path):
        if after not in seen:
            with following(after):
                seen[after] = _same_step(gm, before, after, seen[before])
    with gm.graph.inserting_before(node):
        if node.target in CONVS:
            new = _conv(gm, node, view, seen[view])
        elif target_name(node.target) in GROUPED:
            native = node.target is aten._grouped_mm.default
            new = gm.graph.call_function(nm.grouped_mm.default, (node.args[0], view, seen[view], _offsets(node), native))
        else:
            equation = equation_of(node)
            assert isinstance(equation, Equation)
            new = _product(gm, equation, view, seen[view])
    replace(node, new)


def _same_step(gm: GraphModule, before: Node, after: Node, backward: Node) -> Node:
    """The step from ``before`` to ``after`` again, for the backward weight; a scale or rounding stays the one of W * F."""
    if not (is_scale(after) or is_rounding(after) or is_sum(after)):
        args, kwargs = map_arg((after.args, after.kwargs), lambda arg: backward if arg is before else arg)
        return gm.graph.create_node("call_function", after.target, args, kwargs, f"{after.name}_backward")
    kept = gm.graph.call_function(aten.ne.Scalar, (backward, 0))
    return call(gm, aten.mul.Tensor, (after, kept), f"{after.name}_backward")


def _offsets(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs["offs"]


def _product(gm: GraphModule, equation: Equation, forward: Node, backward: Node) -> Node:
    """linear(x, [out, in], b), addmm(b, x, [in, out]) and matmul(x, [in, out]) are all nm.linear; the rest is nm.einsum."""
    side = equation.operands.index(forward)
    data, term, weight_term, out = equation.operands[1 - side], equation.terms[1 - side], equation.terms[side], equation.out
    added = equation.added
    if len(weight_term) == 2 and out and term == out[:-1] + term[-1:] and {term[-1], out[-1]} == set(weight_term):
        outputs = forward.meta["val"].shape[weight_term.index(out[-1])]
        if weight_term[0] == term[-1]:
            forward, backward = (gm.graph.call_function(aten.t.default, (weight,)) for weight in (forward, backward))
        bias = added if added is not None and tuple(added.meta["val"].shape) == (outputs,) else None
        product = gm.graph.call_function(nm.linear.default, (data, forward, backward, bias))
        added = None if bias is not None else added
    else:
        spare = [axis for axis, letter in enumerate(term) if letter not in weight_term + out]
        if spare:  # summed over in x alone
            data = gm.graph.call_function(aten.sum.dim_IntList, (data, spare))
            term = "".join(letter for letter in term if letter in weight_term + out)
        product = gm.graph.call_function(nm.einsum.default, (data, forward, backward, f"{term},{weight_term}->{out}"))
    return product if added is None else gm.graph.call_function(aten.add.Tensor, (product, added))


def _conv(gm: GraphModule, node: Node, forward: Node, backward: Node) -> Node:
    taps = list(forward.meta["val"].shape[2:])
    given = arguments_of(node)
    stride, dilation = (per_axis(given[name], len(taps)) for name in ("stride", "dilation"))
    data, padding = given["input"], given["padding"]
    if isinstance(padding, str):
        data, sides = _by_name(gm, data, padding, taps, dilation)
    else:
        sides = per_axis(padding, len(taps))
    unbatched = given["input"].meta["val"].ndim == len(taps) + 1
    if unbatched:
        data = gm.graph.call_function(aten.unsqueeze.default, (data, 0))
    arguments = (data, forward, backward, given["bias"], stride, sides, dilation, given["groups"])
    product = gm.graph.call_function(torch.ops.nm.conv.default, arguments)
    return gm.graph.call_function(aten.squeeze.dim, (product, 0)) if unbatched else product


def _by_name(gm: GraphModule, data: Node, padding: str, taps: list[int], dilation: list[int]) -> tuple[Node, list[int]]:
    """padding='same' or 'valid' as numbers; an odd total is padded by hand on the far side, as torch does."""
    if padding == "valid":
        return data, [0] * len(taps)
    totals = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    if any(total % 2 for total in totals):
        far = [side for total in reversed(totals) for side in (0, total % 2)]
        data = gm.graph.call_function(aten.constant_pad_nd.default, (data, far, 0.0))
    return data, [total // 2 for total in totals]
