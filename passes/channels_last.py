"""Let images lie with their channels innermost, from the first convolution to the results.

    before                                    after
    %y = aten.conv2d(%x, %w, ..)  # in rows   %l = aten.contiguous(%x, memory_format=channels_last)
    %z = aten.relu(%y)                        %y = aten.conv2d(%l, %w, ..)          # everything behind it follows
    %v = aten.view(%z, [-1, 64])              %z = aten.relu(%y)
    return %z, %v                             %v = aten.reshape(%z, [-1, 64])
                                              return aten.contiguous(%z), %v        # in rows, as before

Depthwise convolutions and poolings of torch run several times as fast this way on a CPU; packed products do not care. Results
keep the strides that they had. A graph that reads strides, or writes through a view, is returned as it was.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.graph import tidy, written_args
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.native.ops import CONV2D

aten = torch.ops.aten

CONVOLUTIONS = (CONV2D, aten.conv2d.default, aten.convolution.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_READ_STRIDES = (
    aten.as_strided.default, aten.as_strided_.default, aten.view.dtype, aten.view_as_complex.default, aten.stride.int,
    aten.sym_stride.int, aten.is_contiguous.default,
)  # fmt: skip


def channels_last(gm: GraphModule) -> GraphModule:
    """Turn the images of every convolution that gets them in rows."""
    if not any(_in_rows(node) for node in gm.graph.nodes) or any(_depends_on_strides(node) for node in gm.graph.nodes):
        return gm
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    made.__dict__["extras"] = dict(gm.__dict__.get("extras", {}))
    try:
        rows = [_of_rows(value) for value in _results(made)]
        _turn(made)
        _turn_back(made, rows)
    except (RuntimeError, ValueError):  # an op that cannot take images in this layout, or sizes that only data tell
        return gm
    return made


def _in_rows(node: Node) -> bool:
    """A convolution of images whose channels are not innermost. Images of one pixel lie both ways at once."""
    if node.target not in CONVOLUTIONS:
        return False
    value: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
    one = all(isinstance(size, int) and size == 1 for size in value.shape[2:])
    return value.ndim == 4 and not one and not lies_in_channels_last(value)


def _depends_on_strides(node: Node) -> bool:
    """Reads them, or may do so in a body, or writes through a view, which would be a copy."""
    if node.target in _READ_STRIDES or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return node.target in _VIEWS and any(_may_write(user, node) for user in node.users)


def _may_write(user: Node, operand: Node) -> bool:
    known = isinstance(user.target, torch._ops.OpOverload) or user.op == "output"
    return not known or operand in written_args(user)


def _turn(gm: GraphModule) -> None:
    """Convert where a convolution still gets rows, first to last, as what is behind one follows it."""
    for node in gm.graph.nodes:
        if node.target in _VIEWS:
            node.target = aten.reshape.default
    for node in list(gm.graph.nodes):
        if _in_rows(node):
            with gm.graph.inserting_before(node):
                turned = _contiguous(gm, node.args[0], "last", {"memory_format": torch.channels_last})
            node.args = (turned, *node.args[1:])
            for later in [turned, *_from(node)]:
                later.meta.pop("val", None)
            tidy(gm)


def _contiguous(gm: GraphModule, data: Any, suffix: str, how: dict[str, Any]) -> Node:
    return gm.graph.create_node("call_function", aten.contiguous.default, (data,), how, name=f"{data.name}_{suffix}")


def _from(node: Node) -> list[Node]:
    """It and all call nodes behind it in the graph."""
    found, at = list[Node](), node
    while at.op != "output":
        if at.op == "call_function":
            found.append(at)
        at = at.next
    return found


def _results(gm: GraphModule) -> list[Any]:
    (returned,) = gm.graph.output_node().args
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


def _of_rows(result: Any) -> bool:
    value = result.meta.get("val") if isinstance(result, Node) else None
    return isinstance(value, Tensor) and value.is_contiguous()


def _turn_back(gm: GraphModule, rows: list[bool]) -> None:
    """Results that lay in rows do so again."""
    output = gm.graph.output_node()
    results = _results(gm)
    for place, result in enumerate(results):
        if rows[place] and not result.meta["val"].is_contiguous():
            with gm.graph.inserting_before(output):
                results[place] = _contiguous(gm, result, "rows", {})
    (returned,) = output.args
    output.args = (type(returned)(results) if isinstance(returned, (list, tuple)) else results[0],)
    tidy(gm)
