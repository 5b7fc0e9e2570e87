"""Let every product send its input gradient through a weight that is N:M along the output axis too (Bi-Mask, ICML 2023).

    before                          after
    %w = self.fc.weight             %w = self.fc.weight                                # [out, in]
    %v = nm.srste_weight(%w, ...)   %v = nm.srste_weight(%w, ...)                      # W * F
    %y = aten.linear(%x, %v, %b)    %o = self.fc.weight_order                          # [out]
                                    %u = nm.backward_weight(%v, %o, 2, 4, 1)           # W * B, B a subset of F
                                    %y = nm.linear(%x, %v, %u, %b)                     # dx = g (W * B), dW = g^T x

It runs behind any pass that masks the forward weight. A weight whose output channels do not divide keeps B = F.
Safe because y does not read %u: only the gradient of x changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from nm_compiler.ops import products as _ops  # noqa: F401  registers nm::linear and nm::conv
from nm_compiler.ops import weights as _weights  # noqa: F401
from nm_compiler.rewrite import call, masked_nodes
from nm_compiler.sites import Site
from nm_compiler.uses import CONVS, Use, uses

aten = torch.ops.aten


def insert_bimask(gm: GraphModule, *, sites: Sequence[Site]) -> GraphModule:
    """Turn every product of a site into `nm.linear` or `nm.conv`. The order must be registered on the model already."""
    for site in sites:
        if not site.backward_groups:
            continue
        for forward in masked_nodes(gm, site.name):
            products = [use for use in uses(forward) if isinstance(use, Use)]
            with gm.graph.inserting_after(forward):
                order = gm.graph.get_attr(f"{site.name}_order")
            with gm.graph.inserting_after(order):
                arguments = (forward, order, site.pattern.n, site.pattern.m, site.in_axis)
                name = f"{forward.name.removesuffix('_masked')}_backward"
                backward = call(gm, torch.ops.nm.backward_weight.default, arguments, name)
            for use in products:
                _replace(gm, use, forward, backward)
    return gm


def _replace(gm: GraphModule, use: Use, forward: Node, backward: Node) -> None:
    node = use.node
    with gm.graph.inserting_before(node):
        seen = _same_view(gm, use.view, forward, backward)
        new = _conv(gm, node, use.view, seen) if node.target in CONVS else _linear(gm, node, use, seen)
    new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _same_view(gm: GraphModule, view: Node, forward: Node, backward: Node) -> Node:
    """What the product reads, with the backward weight in place of the forward one: the same transposes again."""
    if view is forward:
        return backward
    source = _same_view(gm, view.args[0], forward, backward)  # type: ignore[arg-type]
    return gm.graph.call_function(view.target, (source, *view.args[1:]), dict(view.kwargs))  # type: ignore[arg-type]


def _linear(gm: GraphModule, node: Node, use: Use, seen: Node) -> Node:
    """linear(x, [out, in], b), addmm(b, x, [in, out]) and matmul(x, [in, out]) are all nm.linear."""
    forward, backward = use.view, seen
    if node.target is aten.linear.default:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return gm.graph.call_function(torch.ops.nm.linear.default, (node.args[0], forward, backward, bias))
    added, data = node.args[:2] if node.target is aten.addmm.default else (None, node.args[0])
    forward, backward = (gm.graph.call_function(aten.t.default, (weight,)) for weight in (forward, backward))
    if isinstance(added, Node) and tuple(added.meta["val"].shape) == (forward_out(use),):
        return gm.graph.call_function(torch.ops.nm.linear.default, (data, forward, backward, added))
    product = gm.graph.call_function(torch.ops.nm.linear.default, (data, forward, backward, None))
    return product if added is None else gm.graph.call_function(aten.add.Tensor, (product, added))


def forward_out(use: Use) -> int:
    """Output channels of an addmm: what it adds is a bias only if it has just these."""
    return int(use.view.meta["val"].shape[-1])


def _conv(gm: GraphModule, node: Node, forward: Node, backward: Node) -> Node:
    taps = list(forward.meta["val"].shape[2:])
    given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation"), node.args, strict=False)) | node.kwargs
    stride, dilation = (_each(given.get(name, 1), len(taps)) for name in ("stride", "dilation"))
    at = 8 if node.target is aten.convolution.default else 6
    groups = node.args[at] if len(node.args) > at else node.kwargs.get("groups", 1)
    data, padding = given["input"], given.get("padding", 0)
    if isinstance(padding, str):
        data, sides = _by_name(gm, data, padding, taps, dilation)  # type: ignore[arg-type]
    else:
        sides = _each(padding, len(taps))
    unbatched = given["input"].meta["val"].ndim == len(taps) + 1  # type: ignore[union-attr]
    if unbatched:
        data = gm.graph.call_function(aten.unsqueeze.default, (data, 0))
    arguments = (data, forward, backward, given.get("bias"), stride, sides, dilation, groups)
    product = gm.graph.call_function(torch.ops.nm.conv.default, arguments)
    return gm.graph.call_function(aten.squeeze.dim, (product, 0)) if unbatched else product


def _each(value: object, count: int) -> list[int]:
    """A number for each space axis: 1, [1] and [1, 1] all mean the same."""
    sizes = list(value) if isinstance(value, (list, tuple)) else [value]
    return sizes * count if len(sizes) == 1 else sizes  # type: ignore[return-value]


def _by_name(gm: GraphModule, data: Node, padding: str, taps: list[int], dilation: list[int]) -> tuple[Node, list[int]]:
    """padding='same' or 'valid' as numbers; an odd total is padded by hand on the far side, as torch does."""
    if padding == "valid":
        return data, [0] * len(taps)
    totals = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    if any(total % 2 for total in totals):
        far = [side for total in reversed(totals) for side in (0, total % 2)]
        data = gm.graph.call_function(aten.constant_pad_nd.default, (data, far, 0.0))
    return data, [total // 2 for total in totals]
