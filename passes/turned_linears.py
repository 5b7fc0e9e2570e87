"""Let packed linears of turned data read it as it lies: tokens along a row are the pixels of an image.

    before                                                  after
    %t = aten.transpose(%x, -2, -1)   # of [B, K, T]        %u = aten.unsqueeze(%x, 2)             # [B, K, 1, T]
    %p = nm.packed_linear(%t, ...)    # [B, T, N]           %p = nm.packed_conv2d(%u, ...)         # [B, N, 1, T]
    %y = aten.transpose(%p, -2, -1)   # [B, N, T]           %y = aten.squeeze(%p, 2)               # [B, N, T]

Weights on the left of a matmul come so. The kernels take pixels in rows, so nothing is laid out anew before or behind the
product; the packed weight is the same one. Not for few tokens, or a free number that may turn out small: there the linear's
own kernel is faster. And not in bfloat16, whose products want channels innermost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.rewrite import replace
from nm_compiler.runtime.native.ops import CONV2D, LINEAR
from nm_compiler.runtime.native.shapes import FEW

aten = torch.ops.aten

_ONE = [1, 1]


def turned_linears(gm: GraphModule) -> GraphModule:
    """Rewrite every packed linear between two turns that nobody else needs, before anything is fused into it."""
    for node in [node for node in gm.graph.nodes if node.target is LINEAR]:
        data, back = _source(node.args[0]), only_user(node)
        if data is None or back is None or not is_turn(back):
            continue
        whole = data.meta["val"].ndim == 2
        with gm.graph.inserting_before(node):
            images = gm.graph.call_function(aten.unsqueeze.default, (data, 0)) if whole else data
            images = gm.graph.call_function(aten.unsqueeze.default, (images, 2))
            *operands, activation = node.args[1:]
            arguments = (images, *operands, _ONE, _ONE, [0, 0], _ONE, 1, activation)
            product = gm.graph.create_node("call_function", CONV2D, arguments, name=f"{node.name}_turned")
            result = gm.graph.call_function(aten.squeeze.dim, (product, 2))
            if whole:
                result = gm.graph.call_function(aten.squeeze.dim, (result, 0))
        copied = only_user(back)
        last = copied if copied is not None and copied.target is aten.contiguous.default and not copied.kwargs else back
        replace(last, result)
    return gm


def _source(turned: Any) -> Node | None:
    """What was turned, if it is worth reading as it lies."""
    if not is_turn(turned):
        return None
    data: Node = turned.args[0]
    value = data.meta["val"]
    tokens = value.shape[-1]
    many = isinstance(tokens, int) and tokens > FEW
    return data if value.ndim in (2, 3) and value.dtype == torch.float32 and many else None


def is_turn(node: Node) -> bool:
    """Whether a node exchanges its operand's last two axes."""
    if node.target in (aten.t.default, aten.mT.default):
        return bool(node.meta["val"].ndim > 1)
    if node.target not in (aten.transpose.int, aten.permute.default):
        return False
    axes = node.meta["val"].ndim
    if node.target is aten.transpose.int:
        return {int(axis) % axes for axis in node.args[1:]} == {axes - 2, axes - 1}  # type: ignore[arg-type]
    order: Any = node.args[1]
    return [axis % axes for axis in order] == [*range(axes - 2), axes - 1, axes - 2]


def only_user(node: Node) -> Node | None:
    """The node that reads this one, if it is the only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None
