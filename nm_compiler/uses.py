"""Follow a weight through the graph to the products that read it, or to what is no N:M product and why.

A *use* is one product that reads a weight, possibly through transposes: linear, addmm or matmul with a constant weight, or
a convolution of one to three dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from nm_compiler.graph import getattr_path, target_name

aten = torch.ops.aten

CONVS = {
    aten.conv1d.default: "conv1d", aten.conv2d.default: "conv2d", aten.conv3d.default: "conv3d",
    aten.conv1d.padding: "conv1d", aten.conv2d.padding: "conv2d", aten.conv3d.padding: "conv3d",
    aten.convolution.default: "conv",
}  # fmt: skip
MATMULS = (aten.mm.default, aten.matmul.default)
_VIEWS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.detach.default,
          aten.alias.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default)  # fmt: skip
_PRODUCTS = ("linear", "mm", "matmul", "addmm", "bmm", "baddbmm", "einsum")
_TRANSPOSED_CONVS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


@dataclass(frozen=True, slots=True)
class Use:
    """One product that reads a weight: the node, its op, and the weight's own reduction axis."""

    node: Node
    op: str
    in_axis: int
    conv_groups: int
    view: Node  # the node that the product reads: the weight, or a transpose of it


@dataclass(frozen=True, slots=True)
class Blocked:
    """A reader of a weight that is no N:M product: its op, and why not."""

    op: str
    reason: str


def uses(read: Node) -> Iterator[Use | Blocked]:
    """Follow a weight from the node that reads it, through transposes, to the products, or to what is none."""
    weight = read.meta["val"]
    stack: list[tuple[Node, tuple[int, ...]]] = [(read, tuple(range(weight.ndim)))]
    while stack:
        view, axes = stack.pop()
        for user in view.users:
            if user.op == "call_function" and user.target in _VIEWS and user.args[0] is view:
                stack.append((user, _through(user, axes)))
            else:
                yield _classify(user, view, axes)


def _through(node: Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where the weight's axes lie after a view."""
    if node.target in (aten.t.default, aten.numpy_T.default):
        return axes[::-1]
    if node.target is aten.transpose.int:
        first, second = (int(a) % len(axes) for a in node.args[1:3])  # type: ignore[arg-type]
        swapped = list(axes)
        swapped[first], swapped[second] = axes[second], axes[first]
        return tuple(swapped)
    if node.target is aten.permute.default:
        return tuple(axes[int(a) % len(axes)] for a in node.args[1])  # type: ignore[union-attr, arg-type]
    return axes


def _classify(node: Node, view: Node, axes: tuple[int, ...]) -> Use | Blocked:
    position = next((i for i, arg in enumerate(node.args) if arg is view), None)
    target, ndim = node.target, len(axes)
    if target is aten.linear.default and position == 1 and ndim == 2:
        return Use(node, "linear", axes[1], 1, view)
    if target in CONVS and position == 1:
        if axes[:2] != (0, 1):
            return Blocked("conv", "a convolution reads a transpose of it; groups need the [out, in, *taps] layout")
        if target is aten.convolution.default and node.args[6]:
            return Blocked("conv_transpose", _TRANSPOSED)
        conv_groups = _argument(node, 8 if target is aten.convolution.default else 6, 1)
        return Use(node, f"conv{ndim - 2}d", 1, conv_groups, view)
    if target in MATMULS and position == 1 and ndim == 2:
        return Use(node, "matmul", axes[0], 1, view)
    if target is aten.addmm.default and position == 2 and ndim == 2:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return Blocked("addmm", "addmm with alpha or beta other than 1")
        return Use(node, "addmm", axes[0], 1, view)
    return Blocked(_op_name(node), _why_not(node, position, ndim))


_TRANSPOSED = "a transposed convolution: no N:M kernel reduces along its axis"


def _why_not(node: Node, position: int | None, ndim: int) -> str:
    target, name = node.target, _op_name(node)
    if name.startswith("embedding"):
        return "an embedding: rows are looked up, not multiplied"
    if name in _TRANSPOSED_CONVS:
        return _TRANSPOSED
    if name in _RECURRENT:
        return "inside a fused LSTM, GRU or RNN op: write the cell with linear layers to make it sparse"
    if node.op == "output":
        return "returned by the model as it is"
    if name == "einsum":
        return "read by einsum, which has no N:M rule: write torch.nn.functional.linear"
    if target in (*MATMULS, aten.bmm.default, aten.baddbmm.default):
        if position == 0:
            return "the left operand of a matmul: write x @ weight.T to make it sparse"
        return f"a {ndim}-D weight of a batched matmul: not supported yet"
    return f"read by {target_name(target)}, which has no N:M rule"


def _op_name(node: Node) -> str:
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def _argument(node: Node, position: int, default: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get("groups", default)
    return int(value)  # type: ignore[arg-type]


def ends(gm: GraphModule) -> tuple[set[Node], set[Node]]:
    """The products of the graph with no weighted op before them (stems) and with none after them (heads)."""
    weighted = [node for node in gm.graph.nodes if _is_weighted(gm, node)]
    chosen = set(weighted)
    after: set[Node] = set()
    for node in gm.graph.nodes:
        if any(arg in after or arg in chosen for arg in node.all_input_nodes):
            after.add(node)
    before: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if any(user in before or user in chosen for user in node.users):
            before.add(node)
    return chosen - after, chosen - before


def _is_weighted(gm: GraphModule, node: Node) -> bool:
    """A linear, matmul, convolution (also transposed), embedding or recurrent op that reads a parameter."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._opname
    known = name.startswith(("conv", "embedding")) or name in _RECURRENT or name in _PRODUCTS
    return known and any(_reads_weight(gm, arg) for arg in node.all_input_nodes)


def _reads_weight(gm: GraphModule, node: Node) -> bool:
    while node.op == "call_function" and node.target in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.op != "get_attr":
        return False
    value = getattr_path(gm, node.target)
    return isinstance(value, nn.Parameter) and value.ndim >= 2
