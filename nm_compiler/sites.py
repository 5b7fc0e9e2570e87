"""Which weights become N:M, and why the others cannot.

A weight is planned when all its uses agree on the reduction axis and its groups divide; otherwise it is refused with the
first reason that applies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nm_compiler.errors import NMError, Refusal
from nm_compiler.layout import groups_per_row, out_axis_of
from nm_compiler.pattern import Pattern, PatternMap, matches
from nm_compiler.uses import Blocked, Use, ends, uses


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
    for glob, pattern in patterns.rules:
        if glob != "*" and not any(matches(name, (glob,)) for name in parameters):
            raise NMError(f"pattern={{{glob!r}: '{pattern}'}} matches no weight; globs run over parameter names")
    edges = [ends(gm) for gm in graphs]
    sites: list[Site] = []
    refusals: list[Refusal] = []
    ops: dict[str, str] = {}
    for name, parameter in parameters.items():
        per_graph = [list(_uses_in(gm, name)) for gm in graphs]
        ops[name] = _op_label(per_graph)
        included = matches(name, include)
        verdict = _judge(name, parameter, per_graph, edges, patterns, included is not None, matches(name, exclude))
        if isinstance(verdict, Site):
            sites.append(verdict)
        elif included and not parameter.dtype.is_floating_point:
            raise NMError(
                f"{name} of shape {list(parameter.shape)} is {parameter.dtype} but include={included!r} names it; "
                "only floating-point weights can be N:M: dequantise it, or leave it out of include="
            )
        else:
            refusals.append(verdict)
    if not sites:
        shown = "\n  ".join(f"{r.where} {list(parameters[r.where].shape)}: {r.reason}" for r in refusals[:12])
        raise NMError(
            f"no weight of this {type(model).__name__} can be {_shown(patterns)}:\n  {shown or 'it has no weights'}\n"
            "take stem or head in with include=[...], or choose a pattern whose M divides the input channels"
        )
    return Plan(tuple(sites), tuple(refusals), {n: tuple(p.shape) for n, p in parameters.items()}, ops)


def _shown(patterns: PatternMap) -> str:
    return str(patterns.rules[0][1]) if len(patterns.rules) == 1 and patterns.rules[0][0] == "*" else str(patterns)


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
    edges: Sequence[tuple[set[Node], set[Node]]],
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
        stems, heads = edges[at]
        here = [use.node for use in per_graph[at] if isinstance(use, Use)]
        if all(node in stems for node in here):
            return Refusal(name, "stem: no other weight comes before it (include= makes it sparse)")
        if all(node in heads for node in here):
            return Refusal(name, "head: no other weight comes after it (include= makes it sparse)")
    return Site(name, first.op, shape, first.in_axis, first.conv_groups, pattern)
