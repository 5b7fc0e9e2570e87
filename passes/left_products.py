"""Give dense products with a weight on the left back as they were: `products_to_linear` taken back where nothing is packed.

    before                                                    after
    %t = aten.transpose(%x, -2, -1)     # of [B, K, T]        %y = aten.matmul(%w, %x)    # [B, N, T]
    %r = aten.reshape(%t, [-1, K])
    %p = aten.linear(%r, %w)            # [B T, N]
    %v = aten.reshape(%p, [B, T, N])
    %u = aten.transpose(%v, -2, -1)
    %y = aten.contiguous(%u)

The reshapes are what `flatten_tokens` made of three axes. Turning data and results copies both, which small products notice.
Not for few tokens of a batch, which torch multiplies slowly as they lie (eight of 4 tokens, 256 to 256: 600 us, turned 66 us).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.passes.turned_linears import is_turn, only_user
from nm_compiler.rewrite import replace

aten = torch.ops.aten

_FEW = 12
"""Tokens. Measured with 64 to 1024 inputs and outputs: 8 are 2 to 9 times as fast turned, 16 are 0.8 to 1.3 times."""


def left_products(gm: GraphModule) -> GraphModule:
    """Rewrite every linear without a bias between two turns that nobody else needs, if its result is laid out anew."""
    for node in [node for node in gm.graph.nodes if node.target is aten.linear.default]:
        data, last = _source(node.args[0]), _result(node)
        if data is None or last is None or (node.args[2:] or (None,))[0] is not None or _is_slow(data):
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


def _is_slow(data: Node) -> bool:
    """Whether torch's product of a batch is slower than a linear with its copies."""
    value = data.meta["val"]
    return value.ndim == 3 and isinstance(value.shape[-1], int) and value.shape[-1] <= _FEW


def _result(node: Node) -> Node | None:
    """What lays the result out anew, after it was turned back."""
    back = only_user(node)
    if back is not None and back.target is aten.reshape.default:
        back = only_user(back)
    last = only_user(back) if back is not None and is_turn(back) else None
    return last if last is not None and last.target is aten.contiguous.default and not last.kwargs else None
