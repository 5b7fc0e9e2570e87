"""Which products may leave their result in columns, the layout that the library writes fastest.

A result in columns (strides ``(1, tokens)``) is right everywhere, but not welcome everywhere: a ``view`` may be impossible,
and fused attention falls back to a slow kernel if the last axis is strided. Elementwise ops keep the layout, and the next
packed product reads it as it is: between two packed products, as in an MLP, nothing has to be copied. Others get rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch.fx import Node

aten = torch.ops.aten

ELEMENTWISE = frozenset((
    aten.relu.default, aten.relu_.default, aten.gelu.default, aten.silu.default, aten.silu_.default, aten.tanh.default,
    aten.sigmoid.default, aten.hardswish.default, aten.leaky_relu.default, aten.mul.Tensor, aten.dropout.default,
))  # fmt: skip
VIEWS = frozenset((aten.view.default, aten._unsafe_view.default))
"""What fails where it cannot be a view; `aten.reshape` takes the same arguments."""
RESHAPES = VIEWS | {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}


def between(product: Node, packed: Collection[Node]) -> list[Node] | None:
    """The nodes between ``product`` and the products of ``packed`` that read its result; None if anyone else reads it.

    They are elementwise ops and reshapes that keep the last axis.
    """
    width, found, stack = product.meta["val"].shape[-1], list[Node](), [product]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in packed and user.args[0] is node:
                continue
            if user.target not in ELEMENTWISE and not (user.target in RESHAPES and _same(user.meta["val"].shape[-1], width)):
                return None
            if user not in found:
                found.append(user)
                stack.append(user)
    return found


def leave_in_columns(nodes: Iterable[Node]) -> None:
    """Let the strides of ``nodes`` be found anew, and their views be reshapes, which take any."""
    for node in nodes:
        node.meta.pop("val", None)
        if node.target in VIEWS:
            node.target = aten.reshape.default


def _same(size: object, width: object) -> bool:
    return isinstance(size, int) and isinstance(width, int) and size == width
