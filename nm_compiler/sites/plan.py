"""Which weights become N:M, and why the others cannot.

A weight is planned when all its uses agree on the reduction axis and its groups divide; otherwise it is refused with the
first reason that applies.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nm_compiler.errors import NMError, Refusal, WayOut, refuse_all
from nm_compiler.graph import getattr_path, reads
from nm_compiler.layout import Layout
from nm_compiler.pattern import Pattern, PatternMap, matches
from nm_compiler.sites.ends import ends
from nm_compiler.sites.routers import routers
from nm_compiler.sites.uses import BETWEEN, EMBEDDING, FUSED, Blocked, Use, constants, uses
from nm_compiler.sites.views import is_scale

UNREAD = "not read by the captured graph: give example inputs that use it"
STEM = "stem: no other weight comes before it (include= makes it sparse)"
HEAD = "head: no other weight comes after it (include= makes it sparse)"
ROUTER = "router: its result chooses what weights come next (include= makes it sparse)"


@dataclass(frozen=True, slots=True)
class Site:
    """A weight that becomes N:M.

    name: of the parameter; op: of its first product (linear, matmul, einsum, grouped_mm, conv2d, ...); layout: which axis
    is what; conv_groups: 1 but for grouped convolutions; blocks: into how many equal blocks of output channels (conv
    groups, or slices such as those of an in_proj_weight) its products split the rows, inside which they may be reordered.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    layout: Layout
    pattern: Pattern
    conv_groups: int = 1
    blocks: int = 1

    @property
    def in_axis(self) -> int:
        """The reduction axis, along which forward groups run."""
        return self.layout.in_axis

    @property
    def out_axis(self) -> int:
        """The axis of output channels, along which backward groups run."""
        return self.layout.out_axis

    @property
    def rows(self) -> list[int]:
        """The axes as (*batch, out, *taps, in), for `nm_compiler.layout.as_rows`."""
        return list(self.layout.rows(len(self.shape)))

    @property
    def out(self) -> int:
        """Number of output channels (of each expert)."""
        return self.shape[self.layout.out_axis]

    @property
    def block(self) -> int:
        """Number of output channels that may be reordered among themselves."""
        return self.out // self.blocks

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes that state by group begins with: ``(out,)``, or ``(experts, out)``."""
        return (*(self.shape[axis] for axis in self.layout.batch), self.out)

    @property
    def groups_per_row(self) -> int:
        """Number of forward groups in one output row, taps included."""
        return math.prod(self.shape) // math.prod(self.leading) // self.pattern.m

    @property
    def backward_groups(self) -> bool:
        """Whether groups along output channels exist: the blocks of output channels are multiples of M."""
        return self.block % self.pattern.m == 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Every weight of two or more axes: a site, or a refusal. ``shapes`` and ``ops`` are for the report.

    Weights are all parameters, and the buffers and constants that a product multiplies data with.
    """

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
    may_be_empty: bool = False,
) -> Plan:
    """Plan every parameter of two or more axes over the graphs of one model (evaluation first).

    Raises NMError if a glob of ``include``/``exclude`` matches no parameter, or, unless it ``may_be_empty``, if no weight is
    left to make sparse.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    check_globs(model, patterns, include, exclude)
    fixed = [constants(gm.graph) for gm in graphs]
    special = [(*ends(gm, known), routers(gm, known)) for gm, known in zip(graphs, fixed, strict=True)]
    sites: list[Site] = []
    refusals: list[Refusal] = []
    ops: dict[str, str] = {}
    for name, parameter in parameters.items():
        per_graph = [list(_uses_in(gm, name, known)) for gm, known in zip(graphs, fixed, strict=True)]
        ops[name] = _op_label(per_graph)
        included = matches(name, include)
        verdict = _judge(name, parameter, [use for found in per_graph for use in found], patterns, matches(name, exclude))
        if isinstance(verdict, Site) and included is None:
            at = next(index for index, found in enumerate(per_graph) if found)
            verdict = _customary(verdict, {use.node for use in per_graph[at] if isinstance(use, Use)}, *special[at]) or verdict
        if verdict == Refusal(name, UNREAD) and _is_recurrent(model, name):
            verdict = Refusal(name, FUSED)
        if isinstance(verdict, Site):
            sites.append(verdict)
        elif included and not parameter.dtype.is_floating_point:
            raise NMError(
                f"{name} of shape {list(parameter.shape)} is {parameter.dtype} but include={included!r} names it; "
                "only floating-point weights can be N:M: dequantise it, or leave it out of include="
            )
        else:
            refusals.append(verdict)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, shape, op, reason in _untrained(model, graphs, fixed):
        refusals.append(Refusal(name, reason))
        shapes[name], ops[name] = shape, op
    if not sites and not may_be_empty:
        refuse_all(model, patterns, refusals, shapes)
    return Plan(tuple(sites), tuple(refusals), shapes, ops)


def check_globs(
    model: nn.Module, patterns: PatternMap, include: Sequence[str], exclude: Sequence[str], force: Sequence[str] = ()
) -> None:
    """Raise NMError for a glob that matches no weight."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    for option, globs in (("include", include), ("exclude", exclude), ("force", force)):
        for glob in globs:
            if not any(matches(name, (glob,)) for name in names):
                known = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                raise NMError(f"{option}={glob!r} matches no weight; globs run over parameter names such as {known}")
    for glob, pattern in patterns.rules:
        if glob != "*" and not any(matches(name, (glob,)) for name in names):
            raise NMError(f"pattern={{{glob!r}: '{pattern}'}} matches no weight; globs run over parameter names")


def _is_recurrent(model: nn.Module, name: str) -> bool:
    """Whether a fused op reads the weight where its layer runs: TorchDynamo leaves it to Python, and no fragment shows it."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.RNNBase, nn.RNNCellBase))


def _uses_in(gm: GraphModule, name: str, fixed: Collection[Node]) -> Iterator[Use | Blocked]:
    for node in reads(gm, name):
        yield from uses(node, fixed)


def _untrained(
    model: nn.Module, graphs: Sequence[GraphModule], fixed: Sequence[Collection[Node]]
) -> Iterator[tuple[str, tuple[int, ...], str, str]]:
    """Buffers and constants that a product multiplies data with: name, shape, op and why they stay dense."""
    trained, seen = {name for name, _ in model.named_parameters()}, set()
    buffers = {name for name, _ in model.named_buffers()}
    for gm, known in zip(graphs, fixed, strict=True):
        for node in gm.graph.nodes:
            if node.op != "get_attr" or node.target in trained or node.target in seen:
                continue
            value = getattr_path(gm, node.target)
            if not isinstance(value, Tensor) or value.ndim < 2 or not value.dtype.is_floating_point:
                continue
            products = [use for use in uses(node, known) if isinstance(use, Use) and not any(map(is_scale, use.path))]
            if products:
                seen.add(node.target)
                what = "a buffer" if node.target in buffers else "a plain tensor"
                reason = f"{what}, not a parameter: make it an nn.Parameter(requires_grad=False) to make it sparse"
                yield str(node.target), tuple(value.shape), products[0].op, reason


def _op_label(per_graph: Sequence[Sequence[Use | Blocked]]) -> str:
    return next((use.op for found in per_graph for use in found), "-")


def _judge(
    name: str,
    parameter: Tensor,
    every: Sequence[Use | Blocked],
    patterns: PatternMap,
    excluded: str | None,
) -> Site | Refusal:
    """The site of a weight with the uses ``every``, or the first reason against one. excluded: the glob that names it."""
    shape = tuple(parameter.shape)
    if not parameter.dtype.is_floating_point:
        return Refusal(name, f"not floating point ({parameter.dtype}): dequantise it to make it sparse")
    products = [use for use in every if isinstance(use, Use)]
    others = [use for use in every if isinstance(use, Blocked)]
    if not every:
        return Refusal(name, UNREAD)
    if others:
        reason = others[0].reason
        if excluded and reason == BETWEEN:
            return Refusal(name, f"excluded by {excluded!r}", WayOut.EXCLUDE)
        if products:
            embedded = "shared with an embedding: untie them to make it sparse"
            reason = embedded if reason == EMBEDDING else f"shared: also {reason}"
        return Refusal(name, reason)
    if excluded:
        return Refusal(name, f"excluded by {excluded!r}", WayOut.EXCLUDE)
    pattern = patterns.of(name)
    if pattern is None:
        return Refusal(name, f"no rule of pattern={patterns} matches it: add one")
    first = products[0]
    if any((use.layout, use.conv_groups) != (first.layout, first.conv_groups) for use in products):
        return Refusal(name, "used along different axes by different products: give each a weight of its own")
    cut = _cut(name, shape, products, pattern)
    if cut:
        return cut
    rows = shape[first.layout.out_axis]
    block = math.gcd(rows // first.conv_groups, *(edge for use in products for edge in use.outputs))
    return Site(name, first.op, shape, first.layout, pattern, first.conv_groups, rows // block)


def _customary(site: Site, here: set[Node], stems: set[Node], heads: set[Node], choosing: set[Node]) -> Refusal | None:
    """Why a weight that could be N:M stays dense unless asked for. here: its products, in the first graph that has any."""
    if here <= stems:
        return Refusal(site.name, STEM, WayOut.INCLUDE)
    if here <= heads:
        return Refusal(site.name, HEAD, WayOut.INCLUDE)
    few = site.shape[site.out_axis] < site.shape[site.in_axis]
    return Refusal(site.name, ROUTER, WayOut.INCLUDE) if few and here & choosing else None


def _cut(name: str, shape: tuple[int, ...], products: Sequence[Use], pattern: Pattern) -> Refusal | None:
    """Why the reduction axis, or the parts of it that products read, cannot be cut into groups."""
    first = products[0]
    inputs = shape[first.layout.in_axis]
    if inputs % pattern.m:
        what = "input channels" if first.op.startswith("conv") else "input features"
        if len(shape) > 2 and not first.op.startswith("conv"):
            what = f"weights along axis {first.layout.in_axis}"
        what = what.removesuffix("s") if inputs == 1 else what
        inside = f" in each of {first.conv_groups} conv groups" if first.conv_groups > 1 else ""
        reason = f"{inputs} {what}{inside}, groups of {pattern} need a multiple of {pattern.m}"
        return Refusal(name, reason, WayOut.PATTERN)
    for use in products:
        begin, count = use.inputs
        if begin % pattern.m or count % pattern.m:
            part = f"inputs {begin} to {begin + count - 1} of {inputs}"
            cuts = f"which cuts groups of {pattern}: slice at multiples of {pattern.m}"
            return Refusal(name, f"a product reads {part} by themselves, {cuts}")
    return None
