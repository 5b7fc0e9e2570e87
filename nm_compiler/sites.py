"""Which weights can be N:M, found in the graph, and why the others cannot.

A *use* is one product that reads a weight, possibly through transposes. A weight is planned when all its uses agree on
the reduction axis and its groups divide; otherwise it is refused with the first reason that applies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nm_compiler.errors import NMError, Refusal
from nm_compiler.graph import getattr_path, target_name
from nm_compiler.layout import groups_per_row, out_axis_of
from nm_compiler.pattern import Pattern, PatternMap, matches

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
class Site:
    """A weight that becomes N:M.

    name: of the parameter; op: linear, matmul, addmm, conv1d, conv2d, conv3d; in_axis: the reduction axis (1 for
    ``[out, in, *taps]``, 0 for ``[in, out]``); conv_groups: 1 but for grouped convolutions.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    in_axis: int
    conv_groups: int
    pattern: Pattern

    @property
    def out(self) -> int:
        """Number of output channels."""
        return self.shape[out_axis_of(self.in_axis)]

    @property
    def groups_per_row(self) -> int:
        """Number of forward groups in one output row."""
        return groups_per_row(self.shape, self.in_axis, self.pattern.m)

    @property
    def backward_groups(self) -> bool:
        """Whether groups along output channels exist: C_out / conv groups is a multiple of M."""
        return self.out // self.conv_groups % self.pattern.m == 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Every floating weight of two or more axes: a site, or a refusal. ``shapes`` and ``ops`` are for the report."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    shapes: Mapping[str, tuple[int, ...]]
    ops: Mapping[str, str]

    def site(self, name: str) -> Site | None:
        """The site of that name, or None."""
        return next((site for site in self.sites if site.name == name), None)


@dataclass(frozen=True, slots=True)
class Use:
    """One product that reads a weight: the node, its op, the weight's own reduction axis, and its data input."""

    node: Node
    op: str
    in_axis: int
    conv_groups: int
    view: Node  # the node that the product reads: the weight, or a transpose of it
    data: Node | None


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
    data = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if target is aten.linear.default and position == 1 and ndim == 2:
        return Use(node, "linear", axes[1], 1, view, data)
    if target in CONVS and position == 1:
        if axes[:2] != (0, 1):
            return Blocked("conv", "a convolution reads a transpose of it; groups need the [out, in, *taps] layout")
        if target is aten.convolution.default and node.args[6]:
            return Blocked("conv_transpose", _TRANSPOSED)
        conv_groups = _argument(node, 8 if target is aten.convolution.default else 6, 1)
        return Use(node, f"conv{ndim - 2}d", 1, conv_groups, view, data)
    if target in MATMULS and position == 1 and ndim == 2:
        return Use(node, "matmul", axes[0], 1, view, data)
    if target is aten.addmm.default and position == 2 and ndim == 2:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return Blocked("addmm", "addmm with alpha or beta other than 1")
        return Use(node, "addmm", axes[0], 1, view, node.args[1] if isinstance(node.args[1], Node) else None)
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


def find(
    model: nn.Module,
    graphs: Sequence[GraphModule],
    patterns: PatternMap,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Plan every floating parameter of two or more axes over the graphs of one model (evaluation first).

    Raises NMError if a glob of ``include``/``exclude`` matches no parameter, or if no weight is left to make sparse.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(matches(name, (glob,)) for name in parameters):
                known = ", ".join(list(parameters)[:6]) + (", ..." if len(parameters) > 6 else "")
                raise NMError(f"{option}={glob!r} matches no weight; globs run over parameter names such as {known}")
    ends = [_ends(gm) for gm in graphs]
    sites: list[Site] = []
    refusals: list[Refusal] = []
    ops: dict[str, str] = {}
    for name, parameter in parameters.items():
        per_graph = [list(_uses_in(gm, name)) for gm in graphs]
        ops[name] = _op_label(per_graph)
        included = matches(name, include)
        verdict = _judge(name, parameter, per_graph, ends, patterns, included is not None, matches(name, exclude))
        if isinstance(verdict, Site):
            sites.append(verdict)
        elif included and not parameter.dtype.is_floating_point:
            raise NMError(
                f"{name} of shape {tuple(parameter.shape)} is {parameter.dtype} but include={included!r} names it; "
                "only floating-point weights can be N:M: dequantise it, or leave it out of include="
            )
        else:
            refusals.append(verdict)
    if not sites:
        shown = "\n  ".join(f"{r.where} {list(parameters[r.where].shape)}: {r.reason}" for r in refusals[:12])
        raise NMError(
            f"no weight of this {type(model).__name__} can be {patterns}:\n  {shown or 'it has no weights'}\n"
            "take stem or head in with include=[...], or choose a pattern whose M divides the input channels"
        )
    return Plan(tuple(sites), tuple(refusals), {n: tuple(p.shape) for n, p in parameters.items()}, ops)


def _uses_in(gm: GraphModule, name: str) -> Iterator[Use | Blocked]:
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            yield from uses(node)


def _op_label(per_graph: Sequence[Sequence[Use | Blocked]]) -> str:
    return next((use.op for found in per_graph for use in found), "-")


def _judge(
    name: str,
    parameter: Tensor,
    per_graph: Sequence[Sequence[Use | Blocked]],
    ends: Sequence[tuple[set[Node], set[Node]]],
    patterns: PatternMap,
    included: bool,
    excluded: str | None,
) -> Site | Refusal:
    shape = tuple(parameter.shape)
    if not parameter.dtype.is_floating_point:
        return Refusal(name, f"not floating point ({parameter.dtype})")
    every = [use for found in per_graph for use in found]
    products = [use for use in every if isinstance(use, Use)]
    others = [use for use in every if isinstance(use, Blocked)]
    if not every:
        return Refusal(name, "not read by the captured graph")
    if others:
        reason = others[0].reason
        if products:
            reason = "shared with an embedding" if reason.startswith("an embedding") else f"shared: also {reason}"
        return Refusal(name, reason)
    if excluded:
        return Refusal(name, f"excluded by {excluded!r}")
    pattern = patterns.of(name)
    if pattern is None:
        return Refusal(name, f"no rule of pattern={patterns} matches it")
    first = products[0]
    if any((use.in_axis, use.conv_groups) != (first.in_axis, first.conv_groups) for use in products):
        return Refusal(name, "used along different axes by different products")
    inputs = shape[first.in_axis]
    if first.conv_groups > 1 and inputs == 1:
        return Refusal(name, "depthwise convolution: one input channel a group, nothing to choose from")
    if inputs % pattern.m:
        what = "input channels" if first.op.startswith("conv") else "input features"
        inside = f" in each of {first.conv_groups} conv groups" if first.conv_groups > 1 else ""
        return Refusal(name, f"{inputs} {what}{inside}, groups of {pattern} need a multiple of {pattern.m}")
    if not included:
        at = next(index for index, found in enumerate(per_graph) if found)
        stems, heads = ends[at]
        here = [use.node for use in per_graph[at] if isinstance(use, Use)]
        if all(node in stems for node in here):
            return Refusal(name, "stem: no other weight comes before it (include= makes it sparse)")
        if all(node in heads for node in here):
            return Refusal(name, "head: no other weight comes after it (include= makes it sparse)")
    return Site(name, first.op, shape, first.in_axis, first.conv_groups, pattern)


def _ends(gm: GraphModule) -> tuple[set[Node], set[Node]]:
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
