"""Let packed products add and activate while they write their result.

    before                                                      after
    %y = nm.packed_linear(%x, %v, %c, None, %b, None, .., "")   %z = nm.packed_linear(%x, %v, %c, None, %b, %r, .., "relu")
    %s = aten.add.Tensor(%y, %r)
    %z = aten.relu(%s)

An addition of the same shape first, then an activation, each only where nobody else reads what comes before it. Reshapes in
between are looked through: additions and activations do not care for the shape, and activations not for the order of axes.
Dropouts of evaluation are nothing.
The product moves to where it is activated, so nothing on the way may write into a tensor: it could be one that it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nm_compiler.runtime.native.ops import CONV2D, LINEAR

aten = torch.ops.aten

PACKED = (LINEAR, CONV2D)
ADD = (aten.add.Tensor, aten.add_.Tensor)
RESHAPES = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.dim,
)  # fmt: skip
_TURNS = (aten.permute.default, aten.contiguous.default)
_PLAIN = {
    aten.relu.default: "relu", aten.relu_.default: "relu", aten.silu.default: "silu", aten.silu_.default: "silu",
    aten.relu6.default: "relu6", aten.relu6_.default: "relu6", aten.hardswish.default: "hardswish",
    aten.hardswish_.default: "hardswish",
}  # fmt: skip
_CLAMPS = (aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default)
_RESIDUAL = 5  # where the op's arguments have it


def fuse_epilogues(gm: GraphModule) -> GraphModule:
    """Fuse what follows every packed product, as far as it goes."""
    for product in [node for node in gm.graph.nodes if node.target in PACKED]:
        while _fuse(gm, product):
            pass
    return gm


def _fuse(gm: GraphModule, product: Node) -> bool:
    """Take one more step into the product; False if there is none to take."""
    between, step = next_step(product)
    if step is None or product.args[-1] != "" or written_between(product, between, step):
        return False
    name = activation_of(step)
    other = product.args[_RESIDUAL] if name else _added(product, between, step)
    if not name and other is None:
        return False
    _taken(gm, product, between, step, other, name or "")
    return True


def next_step(product: Node) -> tuple[list[Node], Node | None]:
    """Reshapes, turns and dropouts behind the product that nobody else reads, and what reads the last of them."""
    between, at = list[Node](), product
    while len(at.users) == 1:
        (user,) = at.users
        if user.args[:1] != (at,) or (user.target not in (*RESHAPES, *_TURNS) and not _nothing(user)):
            return between, user
        between.append(user)
        at = user
    return between, None


def written_between(product: Node, between: list[Node], step: Node) -> bool:
    """Whether anything writes into a tensor after the product and before the step."""
    at = product.next
    while at is not step:
        if at not in between and isinstance(at.target, torch._ops.OpOverload) and at.target._schema.is_mutable:
            return True
        at = at.next
    return False


def _nothing(node: Node) -> bool:
    """A dropout that is switched off."""
    return node.target is aten.dropout.default and node.args[2] is False


def activation_of(step: Node) -> str | None:
    """The packed op's name for what the node computes; None if it has none."""
    if step.target is aten.gelu.default:
        return "gelu_tanh" if step.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if step.target in _CLAMPS:
        return "relu6" if tuple(step.args[1:]) == (0, 6) and not step.kwargs else None
    return _PLAIN.get(step.target)  # type: ignore[call-overload, no-any-return]


def _added(product: Node, between: list[Node], step: Node) -> Node | None:
    """What is added to the product, if all of it can be: the same shape and dtype, unscaled."""
    last = between[-1] if between else product
    turned = any(each.target in _TURNS for each in between)
    if turned or step.target not in ADD or product.args[_RESIDUAL] is not None or step.kwargs.get("alpha", 1) != 1:
        return None
    first, second = step.args[0], step.args[1]
    other: Any = second if first is last else first
    if other is last or not isinstance(other, Node) or (first is not last and step.target is aten.add_.Tensor):
        return None
    mine, theirs = last.meta["val"], other.meta.get("val")
    fits = isinstance(theirs, torch.Tensor) and theirs.dtype == mine.dtype and tuple(theirs.shape) == tuple(mine.shape)
    dynamic = sum(not isinstance(size, int) for size in product.meta["val"].shape)
    return other if fits and (dynamic < 2 or not any(each.target in RESHAPES for each in between)) else None


def _taken(gm: GraphModule, product: Node, between: list[Node], step: Node, residual: Any, activation: str) -> None:
    """Move the product, and the reshapes behind it, to where the step is: what it adds is there by then. The step goes."""
    shapes = [each for each in between if not _nothing(each)]
    if isinstance(residual, Node) and residual is not product.args[_RESIDUAL] and shapes:
        with gm.graph.inserting_before(step):
            sizes = [size if isinstance(size, int) else -1 for size in product.meta["val"].shape]
            residual = gm.graph.call_function(aten.reshape.default, (residual, sizes))
    product.args = (*product.args[:_RESIDUAL], residual, *product.args[_RESIDUAL + 1 : -1], activation)
    at = product
    step.prepend(product)
    for each in shapes:
        each.args = (at, *each.args[1:])
        step.prepend(each)
        at = each
    step.replace_all_uses_with(at)
    gm.graph.erase_node(step)
    for each in reversed(between):
        if _nothing(each):
            gm.graph.erase_node(each)
