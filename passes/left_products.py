"""Give dense products with a weight on the left back as they were: `products_to_linear` taken back where nothing is packed.

    before                                                    after
    %t = aten.transpose(%x, -2, -1)     # of [B, K, T]        %y = aten.matmul(%w, %x)    # [B, N, T]
    %r = aten.reshape(%t, [-1, K])
    %p = aten.linear(%r, %w)            # [B T, N]
    %v = aten.reshape(%p, [B, T, N])
    %u = aten.transpose(%v, -2, -1)
    %y = aten.contiguous(%u)

The reshapes are what `flatten_tokens` made of three axes. Turning data and results copies both, which small products notice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.passes.turned_linears import is_turn, only_user
from nm_compiler.rewrite import replace

aten = torch.ops.aten


def left_products(gm: GraphModule) -> GraphModule:
    """Rewrite every linear without a bias between two turns that nobody else needs, if its result is laid out anew."""
    for node in [node for node in gm.graph.nodes if node.target is aten.linear.default]:
        data, last = _source(node.args[0]), _result(node)
        if data is None or last is None or (node.args[2:] or (None,))[0] is not None:
            continue
        with gm.graph.inserting_before(last):
            product = gm.graph.call_function(aten.matmul.default, (node.args[1], data))
        replace(last, product)
    return gm


def _source(tokens: Any) -> Node | None:
    """What was turned and flattened."""
    if tokens.target is aten.reshape.default and tokens.args[1] == [-1, tokens.meta["val"].shape[-1]]:
        tokens = tokens.args[0]
    data: Node | None = tokens.args[0] if is_turn(tokens) else None
    return data if data is not None and data.meta["val"].ndim in (2, 3) else None


def _result(node: Node) -> Node | None:
    """What lays the result out anew, after it was turned back."""
    back = only_user(node)
    if back is not None and back.target is aten.reshape.default:
        back = only_user(back)
    last = only_user(back) if back is not None and is_turn(back) else None
    return last if last is not None and last.target is aten.contiguous.default and not last.kwargs else None
