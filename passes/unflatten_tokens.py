"""Give linears their data as it lies again, where that is as fast: `flatten_tokens` taken back for the CPU.

    before                                                    after
    %t = aten.reshape(%x, [-1, K])      # of [B, T, K]        %y = nm.packed_linear(%x, ...)    # [B, T, N]
    %p = nm.packed_linear(%t, ...)      # [B T, N]
    %y = aten.reshape(%p, [B, T, N])

Packed products take any number of axes, and torch's linear flattens three of a contiguous tensor by itself. A reshape costs
about a microsecond of Python, which small products notice. The same numbers in the same order, so the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.rewrite import replace
from nm_compiler.runtime.native.ops import LINEAR

aten = torch.ops.aten


def unflatten_tokens(gm: GraphModule) -> GraphModule:
    """Rewrite every linear between two reshapes that nobody else needs."""
    for node in [node for node in gm.graph.nodes if node.target in (LINEAR, aten.linear.default)]:
        data, back = _as_it_lies(node), _turned_back(node)
        if data is None or back is None or not _leads_to(data, back):
            continue
        node.args = (data, *node.args[1:])
        replace(back, node)
    return gm


def _as_it_lies(node: Node) -> Node | None:
    """What was reshaped to tokens and features, if the linear takes it as well."""
    tokens: Any = node.args[0]
    if tokens.target is not aten.reshape.default or tokens.args[1] != [-1, tokens.meta["val"].shape[-1]]:
        return None
    data: Node = tokens.args[0]
    value = data.meta["val"]
    if value.ndim < 3 or value.shape[-1] != tokens.meta["val"].shape[-1]:
        return None
    return data if node.target is LINEAR or (value.ndim == 3 and value.is_contiguous()) else None


def _turned_back(node: Node) -> Node | None:
    """The reshape that alone reads the linear."""
    back = next(iter(node.users)) if len(node.users) == 1 else None
    return back if back is not None and back.target is aten.reshape.default and back.args[0] is node else None


def _leads_to(data: Node, back: Node) -> bool:
    """Whether the result has the data's sizes but for its last."""
    mine, theirs = data.meta["val"].shape[:-1], back.meta["val"].shape[:-1]
    return len(mine) == len(theirs) and all(_same(one, other) for one, other in zip(mine, theirs, strict=True))


def _same(one: Any, other: Any) -> bool:
    """Equal numbers, or the same formula: nothing is assumed about a size."""
    numbers = isinstance(one, int), isinstance(other, int)
    return bool(one == other) if all(numbers) else not any(numbers) and bool(one.node.expr == other.node.expr)
