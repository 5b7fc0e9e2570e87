"""Follow a weight through the graph to the products that read it, or to what is no N:M product and why.

A *use* is one product of the weight with data: any product that can be written as an einsum of two tensors
(`nm_compiler.sites.equations`), a convolution of one to three dimensions, or a grouped matmul of experts. Between the weight
and the product there may be views and constant scales (`nm_compiler.sites.views`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from nm_compiler.graph import arguments_of, reads, target_name
from nm_compiler.layout import Layout
from nm_compiler.sites.equations import LINEAR, PRODUCTS, equation_of
from nm_compiler.sites.views import (
    Seen,
    fragments,
    is_scale,
    is_sum,
    is_view,
    joined,
    place_of,
    reads_shape_only,
    start,
    start_of,
    step,
)

aten = torch.ops.aten

CONVS = {
    aten.conv1d.default: "conv1d", aten.conv2d.default: "conv2d", aten.conv3d.default: "conv3d",
    aten.conv1d.padding: "conv1d", aten.conv2d.padding: "conv2d", aten.conv3d.padding: "conv3d",
    aten.convolution.default: "conv",
}  # fmt: skip
GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")  # by name: transformers need not be there
_TRANSPOSED_CONVS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


@dataclass(frozen=True, slots=True)
class Use:
    """One product that reads a weight: the node and its op, and which axes of the weight it sums over and keeps.

    inputs, outputs: (start, count) along the reduction and the output axis, less than all of them for a slice.
    path: the nodes from the one that reads the weight to the one that the product reads.
    """

    node: Node
    op: str
    layout: Layout
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    conv_groups: int
    path: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Blocked:
    """A reader of a weight that is no N:M product: its op, and why not."""

    op: str
    reason: str


def multiplied_between(weight: Any, *earlier: Any) -> Any:
    """Stands for Python between fragments that multiplies a weight with data; a graph with it is planned on and never run."""
    raise AssertionError("an outline is not to be run")


def embedding_between(table: Any, *earlier: Any) -> Any:
    """Stands for Python between fragments that looks rows of a table up, likewise."""
    raise AssertionError("an outline is not to be run")


def code_between(*values: Any) -> Any:
    """Stands for the Python that runs between fragments, and for the choice between branches, likewise."""
    raise AssertionError("an outline is not to be run")


def constants(graph: Graph) -> set[Node]:
    """The nodes that depend on parameters, buffers and constants alone."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(arg in found for arg in node.all_input_nodes)):
            found.add(node)
    return found


def uses(read: Node, fixed: Collection[Node] | None = None) -> Iterator[Use | Blocked]:
    """Follow a weight from the node that reads it to the products, or to what is none.

    fixed: the graph's `constants`, where the caller has them.
    """
    fixed = constants(read.graph) if fixed is None else fixed
    found, reached = _followed(read, fixed)
    for seen, user, why in found:
        if not _only_scales(user, reached, fixed):
            verdict = _lost(user, why, fixed) if why else _classify(user, seen, fixed)
            if isinstance(verdict, Blocked) and seen.scaled:  # a table that something is multiplied by, not a scaled weight
                verdict = Blocked(
                    _op_name(seen.scaled), f"read by {target_name(seen.scaled.target)}, and then {verdict.reason}"
                )
            yield verdict


def _followed(read: Node, fixed: Collection[Node]) -> tuple[list[tuple[Seen, Node, str | None]], set[Node]]:
    """Where a weight cannot be followed any further: as it is seen there, by whom it is read, and why, if that is known.

    Also all nodes that show it.
    """
    stack, found, halves = [start(read)], list[tuple[Seen, Node, str | None]](), dict[Node, Seen]()
    reached = {read: {place_of(stack[0])}}
    while stack:
        seen = stack.pop()
        for user in seen.node.users:
            if reads_shape_only(user, seen.node):
                continue
            after: Seen | str | None
            if is_sum(user) and user in fixed:
                other = seen if len(user.all_input_nodes) == 1 else halves.pop(user, None)
                if other is None:
                    halves[user] = seen
                    continue
                after = joined(seen, other, user)
            else:
                after = step(seen, user, fixed)
            if not isinstance(after, Seen):
                found.append((seen, user, after))
            elif place_of(after) not in reached.setdefault(user, set()):
                reached[user].add(place_of(after))
                stack.append(after)
    return [*found, *((seen, user, None) for user, seen in halves.items())], set(reached)


def _lost(node: Node, why: str, fixed: Collection[Node]) -> Blocked:
    """A weight cannot be followed past ``node``: ``why``, unless what reads it in the end is no product anyway."""
    stack, readers = [node], list[Node]()
    while stack:
        for user in stack.pop().users:
            (stack if is_view(user) or user in fixed else readers).append(user)
    if not readers or any(user.target in (*CONVS, *PRODUCTS) or target_name(user.target) in GROUPED for user in readers):
        return Blocked(_op_name(node), why)
    return Blocked(_op_name(readers[0]), _why_not(readers[0], computed=False))


def _only_scales(node: Node, reached: Collection[Node], fixed: Collection[Node]) -> bool:
    """Whether all that comes of a node is a factor of the same weight: the norm in weight norm or spectral norm."""
    if node not in fixed or not node.users:
        return False
    return all((user in reached and is_scale(user)) or _only_scales(user, reached, fixed) for user in node.users)


def _classify(node: Node, seen: Seen, fixed: Collection[Node]) -> Use | Blocked:
    name = _op_name(node)
    position = next((i for i, arg in enumerate(node.args) if arg is seen.node), None)
    if node.target in CONVS and position == 1:
        return _convolution(node, seen)
    if node.op == "call_function" and target_name(node.target) in GROUPED and position == 1 and seen.dims.ndim == 3:
        return _placed(node, "grouped_mm", seen, ("batch", "in", "out"))
    if node.target not in PRODUCTS:
        return Blocked(name, _why_not(node, computed=node in fixed))
    equation = equation_of(node)
    if isinstance(equation, str):
        return Blocked(name, equation)
    side = next((i for i, arg in enumerate(equation.operands) if arg is seen.node), None)
    if side is None:
        return Blocked(name, f"added to the result of {target_name(node.target)}, as a bias is")
    if equation.operands[0] is equation.operands[1]:
        return Blocked(name, "multiplied with itself before any data: multiply the data with it twice")
    if node.target is LINEAR and side == 0:
        return Blocked(name, "the input of a linear, not its weight: multiply data with it, as in w @ x.T")
    if node.target is not LINEAR and equation.operands[1 - side] in fixed:
        return Blocked(name, "multiplied with another weight before any data: multiply the data with one, then the other")
    ours, theirs, out = equation.terms[side], equation.terms[1 - side], equation.out
    if any(letter not in out + theirs for letter in ours):
        return Blocked(name, f"{name} sums over one of its axes before the product: make the sum the parameter")
    parts = [("batch" if c in out else "in") if c in theirs else "out" for c in ours]
    return _placed(node, "matmul" if name == "mm" else name, seen, parts)


def _convolution(node: Node, seen: Seen) -> Use | Blocked:
    given = arguments_of(node)
    groups: Any = given["groups"]
    if given.get("transposed"):
        return Blocked("conv_transpose", _TRANSPOSED)
    if groups > 1 and seen.dims.shape[1] == 1:
        return Blocked("conv", "depthwise convolution: one input channel a group, nothing to choose from")
    parts = ("out", "in", *["taps"] * (seen.dims.ndim - 2))
    return _placed(node, f"conv{seen.dims.ndim - 2}d", seen, parts, groups)


class _Step(NamedTuple):
    """An axis of the product walks along ``axis`` of the weight: ``size`` entries ``jump`` apart; stride: in the view."""

    stride: int
    axis: int
    jump: int
    size: int


def _walked(seen: Seen, parts: Sequence[str], shape: tuple[int, ...]) -> dict[str, list[_Step]] | str:
    """Along which axes of the weight each part of the product walks, or why that cannot be said.

    Where several axes play one part, the fastest in memory is the one that groups run along.
    """
    walked: dict[str, list[_Step]] = {"in": [], "out": [], "batch": [], "taps": []}
    for part, size, stride in zip(parts, seen.dims.shape, seen.dims.stride(), strict=True):
        if size == 1 or stride == 0:
            if part == "in" and size > 1:
                return "expanded along the axis that its product sums over: store it at full size"
            continue
        steps = fragments(size, stride, shape)
        if steps is None:
            return "reshaped across its axes: keep the parameter in the shape that its product reads"
        fastest, *others = (_Step(stride, *each) for each in steps)
        walked[part].append(fastest)
        walked[{"in": "taps", "out": "batch"}.get(part, part)].extend(others)
    return walked


def _placed(node: Node, op: str, seen: Seen, parts: Sequence[str], conv_groups: int = 1) -> Use | Blocked:
    """Carry the parts of the product's axes over to the weight's own axes."""
    shape = tuple(int(size) for size in seen.path[0].meta["val"].shape)
    walked = _walked(seen, parts, shape)
    if isinstance(walked, str):
        return Blocked(op, walked)
    units = [axis for axis, size in enumerate(shape) if size == 1]
    if "in" not in parts or not (walked["in"] or units):
        return Blocked(op, "multiplied element by element: its product sums over none of its axes")
    inner = min(walked["in"] or [_Step(0, units[-1], 1, 1)])
    if inner.jump != 1:
        return Blocked(op, f"its product reads weights {inner.jump} apart, groups need consecutive ones")
    if any(inner.stride == stride for stride, _ in seen.indexed):
        return Blocked(op, "indexed along the axis that its product sums over: index the data in its place")
    units = [axis for axis in units if axis != inner.axis]
    outs = [step for step in walked["out"] if step.axis != inner.axis]
    if not outs and not units:
        return Blocked(op, "no output axis: every weight row meets data of its own")
    outer = min(outs or [_Step(0, units[0], 1, 1)])
    unwalked = set(range(len(shape))) - {step.axis for steps in walked.values() for step in steps}
    batch = {step.axis for part in ("batch", "out") for step in walked[part]} | unwalked
    batch -= {axis for axis in units if axis > min(inner.axis, outer.axis)} | {inner.axis, outer.axis}
    inputs = start_of(seen.dims, inner.axis, shape), inner.size
    outputs = (start_of(seen.dims, outer.axis, shape), outer.size) if outer.jump == 1 else (0, 1)
    return Use(node, op, Layout(inner.axis, outer.axis, tuple(sorted(batch))), inputs, outputs, conv_groups, seen.path)


HANDED_OVER = "handed to Python that TorchDynamo does not compile, which may do anything with it"
BETWEEN = "multiplied by Python that TorchDynamo does not compile, where no mask reaches it"
EMBEDDING = "an embedding: rows are looked up, not multiplied"
FUSED = "inside a fused LSTM, GRU or RNN op: write the cell with linear layers to make it sparse"
_TRANSPOSED = "a transposed convolution: no N:M kernel reduces along its axis"


def _why_not(node: Node, *, computed: bool) -> str:
    name = _op_name(node)
    if node.target is multiplied_between:
        return BETWEEN
    if node.target is code_between:
        return HANDED_OVER
    if name.startswith("embedding"):
        return EMBEDDING
    if name in _TRANSPOSED_CONVS:
        return _TRANSPOSED
    if name in RECURRENT:
        return FUSED
    if node.op == "output":
        return "returned by the model as it is"
    if name == "bilinear":
        return "bilinear sums over two axes of it at once: write two products"
    if not computed:
        return _read_by(node)
    if is_scale(node):
        return "a factor of another weight"
    if name == "cat":
        return "joined with other weights before its product: write a product for each, or keep one joined parameter"
    if name in ("batch_norm", "sub", "add", "rsub"):
        return f"{_read_by(node)}: behind it zeros are no longer zeros, so use a layer whose weight is a plain parameter"
    return _read_by(node)


def _read_by(node: Node) -> str:
    return f"read by {target_name(node.target)}, which has no N:M rule"


def _op_name(node: Node) -> str:
    if node.target in (multiplied_between, embedding_between):
        return "-" if node.target is multiplied_between else "embedding"
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def layouts(graphs: Sequence[GraphModule], model: nn.Module) -> dict[str, Layout]:
    """The layout of every parameter that a product reads, as its first product has it."""
    found: dict[str, Layout] = {}
    for gm in graphs:
        fixed = constants(gm.graph)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and name not in found:
                seen = (use.layout for node in reads(gm, name) for use in uses(node, fixed) if isinstance(use, Use))
                if (first := next(seen, None)) is not None:
                    found[name] = first
    return found
