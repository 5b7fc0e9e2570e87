"""From captured graphs to coupled axes: walk, pin the outputs that matter, prove dependences, name the classes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from nm_compiler.axes.analysis import Analysis, Dims
from nm_compiler.axes.dependence import settle
from nm_compiler.axes.outputs import Outputs, chosen
from nm_compiler.axes.result import Axes, AxisClass, Family, Leaf, Member, Product, Sum
from nm_compiler.axes.result import Axis as Expression
from nm_compiler.axes.rules import RULES
from nm_compiler.axes.terms import Term, Terms
from nm_compiler.capture.signature import Signature
from nm_compiler.layout import Layout

_LOG = logging.getLogger(__name__)


def analyse(
    model: nn.Module,
    graphs: Sequence[tuple[GraphModule, Signature]],
    *,
    layouts: Mapping[str, Layout],
    outputs: Outputs = None,
) -> Axes:
    """The coupled axes of ``model`` over all of its captured graphs. Reads shapes only; weights may be on the meta device.

    layouts: of the weights of products, for the roles of their axes;
    outputs: those that must keep their order, see `nm_compiler.axes.outputs.chosen`.
    """
    analysis = Analysis(model, RULES)
    kept = chosen([signature.out_spec for _, signature in graphs], outputs)
    for (gm, _), (names, indices) in zip(graphs, kept, strict=True):
        values = analysis.run(gm) or ()
        for name, index in zip(names, indices, strict=True):
            for dims in _tensors(values[index]):
                analysis.pin(dims, f"output {name}" if name else "the output")
    settle(analysis.terms, analysis.spaces)
    for op, count in analysis.unknown.items():
        _LOG.info("no rule for %s: it pinned %d axes", op, count)
    names = tuple(dict.fromkeys(name or "the output" for found, _ in kept for name in found))
    return _Naming(model, analysis, layouts).axes(names)


def _tensors(value: Any) -> list[Dims]:
    return [value] if isinstance(value, tuple) and all(isinstance(term, Term) for term in value) else []


class _Naming:
    """Classes get the name of a weight axis that consists of them alone, else that of a piece of one."""

    def __init__(self, model: nn.Module, analysis: Analysis, layouts: Mapping[str, Layout]) -> None:
        self.terms: Terms = analysis.terms
        order = [*dict(model.named_parameters()), *dict(model.named_buffers())]
        self.state = {name: analysis.state[name] for name in order if name in analysis.state}
        self.layouts = layouts
        self.unknown = dict(analysis.unknown)
        self.names: dict[int, str] = {}
        self.found: dict[int, Term] = {}
        self._name(alone=True)
        self._name(alone=False)

    def _leaves(self, term: Term) -> list[Term]:
        return list({id(leaf): leaf for leaf in self.terms.leaves(term) if leaf.size > 1}.values())

    def _name(self, *, alone: bool) -> None:
        for name, dims in self.state.items():
            for axis, term in enumerate(dims):
                found = self._leaves(term)
                if alone and len(found) != 1:
                    continue
                for position, leaf in enumerate(found):
                    self.found.setdefault(id(leaf), leaf)
                    self.names.setdefault(id(leaf), f"{name}[{axis}]" + ("" if len(found) == 1 else f".{position}"))

    def axes(self, outputs: tuple[str, ...]) -> Axes:
        """The axes, with the names that were found. outputs: those that keep their order."""
        members: dict[int, list[Member]] = {}
        for name, dims in self.state.items():
            for axis, term in enumerate(dims):
                for leaf in self._leaves(term):
                    members.setdefault(id(leaf), []).append(Member(name, axis, self._role(name, axis)))
        rank = {key: index for index, key in enumerate(members)}
        ordered = sorted(self.found.items(), key=lambda item: rank[item[0]])
        classes = tuple(self._class(leaf, members[key]) for key, leaf in ordered)
        state = {name: tuple(self._expression(term) for term in dims) for name, dims in self.state.items()}
        return Axes(classes, state, outputs, self.unknown)

    def _class(self, leaf: Term, members: Iterable[Member]) -> AxisClass:
        needs = [] if leaf.pinned else [need for need in leaf.needs if id(need) in self.names]
        names = tuple(self.names[id(need)] for need in needs)
        return AxisClass(self.names[id(leaf)], leaf.size, names, tuple(n.size for n in needs), tuple(members), leaf.pinned)

    def _role(self, name: str, axis: int) -> str:
        layout = self.layouts.get(name)
        if layout is None:
            return "with"
        return "in" if axis == layout.in_axis else "out" if axis == layout.out_axis else "with"

    def _expression(self, term: Term) -> Expression:
        term = self.terms.find(term)
        if term.kind == "leaf":
            return Leaf(self.names.get(id(term), f"#{term.serial}"), term.size)
        parts = tuple(self._expression(part) for part in term.parts)
        if term.kind == "family":
            return Family(tuple(self._expression(key) for key in term.keys), parts, term.size)
        return (Product if term.kind == "product" else Sum)(parts, term.size)
