"""permute and show_axes: reorder the channels of a model so that N:M masks keep more, without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from nm_compiler.axes.analyse import analyse
from nm_compiler.axes.orders import checked, random_orders
from nm_compiler.axes.outputs import Outputs
from nm_compiler.axes.reorder import inverse, needs_of
from nm_compiler.axes.result import Axes
from nm_compiler.axes.search import search_orders
from nm_compiler.errors import NMError
from nm_compiler.layout import Layout
from nm_compiler.passes.permute import permute as permute_pass
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.signature import Signature
from nm_compiler.sites import Plan, find
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.uses import layouts

Order = str | Mapping[str, Any]
"""``"search"``, ``"random"``, or orders by axis."""


@dataclass(frozen=True)
class Captured:
    """A captured model. graphs: by training flag; plan: its N:M weights; layouts: the axes of every weight of a product."""

    graphs: Mapping[bool, tuple[GraphModule, Signature]]
    plan: Plan | None
    layouts: Mapping[str, Layout]


@dataclass(frozen=True)
class Permutation(Mapping[str, Tensor]):
    """What `permute` did: an order, int64 ``[*rows, size]``, for every class of axes that it moved.

    retained: per N:M weight, the share of magnitude that its forward mask kept before, and keeps now.
    """

    orders: Mapping[str, Tensor]
    axes: Axes
    retained: Mapping[str, tuple[float, float]]

    def inverse(self) -> dict[str, Tensor]:
        """The orders that put everything back: ``nm.permute(model, inputs, order=permutation.inverse())``."""
        return inverse(self.orders, needs_of(self.axes))

    def __getitem__(self, name: str) -> Tensor:
        return self.orders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)

    def __str__(self) -> str:
        lines = [f"{len(self.orders)} of {len(self.axes)} axis classes permuted; retained magnitude of each N:M weight:"]
        width = max(map(len, self.retained), default=0)
        lines += [f"  {name:{width}}  {before:.4f} -> {after:.4f}" for name, (before, after) in self.retained.items()]
        return "\n".join(lines)


def permute(
    model: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    pattern: PatternSpec = "2:4",
    order: Order = "search",
    outputs: Outputs = None,
    optimizer: Optimizer | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dynamic_shapes: Any = None,
    seed: int = 0,
    budget_s: float | None = None,
) -> Permutation:
    """Put the channels of ``model`` in another order, in place; it computes the same function.

    pattern, include, exclude: which weights the search has in mind, as in `compile`;
    order: ``"search"`` for the most retained magnitude, ``"random"``, or a mapping from axes (see `show_axes`) to orders,
    int64 ``[size]`` with ``new[i] = old[order[i]]``; what it does not name stays.
    outputs: those that must not change, as index, name, several, or a function of the outputs. By default all, but for models
    that name them, such as Hugging Face's, the logits and losses: other outputs are then right up to the order of channels.
    optimizer: whose state of the permuted parameters (momenta of their shape) goes along.
    seed, budget_s: of the search; seconds.

    The state_dict keeps its names and shapes, and loads into any model of the architecture.
    Raises NMError, nothing changed, if the model cannot be captured or an order does not fit.
    Reference: Pool & Yu, NeurIPS 2021.
    """
    found = captured_and_planned(model, example_inputs, kwargs, pattern, include, exclude, dynamic_shapes, what="nm.permute")
    axes = coupled(model, found, outputs)
    return apply(model, found, axes, order, optimizer=optimizer, seed=seed, budget_s=budget_s)


def show_axes(
    model: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    dynamic_shapes: Any = None,
) -> Axes:
    """Which axes of the model's weights one order must permute together, and which are pinned and why.

    Returns a value to print, to iterate over and to ``draw("axes.svg")``. Nothing is changed; meta weights will do.
    """
    found = captured_and_planned(model, example_inputs, kwargs, None, (), (), dynamic_shapes, what="nm.show_axes")
    return coupled(model, found, outputs)


def coupled(model: nn.Module, found: Captured, outputs: Outputs) -> Axes:
    """The coupled axes of a captured model."""
    return analyse(model, list(found.graphs.values()), layouts=found.layouts, outputs=outputs)


def apply(
    model: nn.Module, found: Captured, axes: Axes, order: Order, *,
    optimizer: Optimizer | None = None, seed: int = 0, budget_s: float | None = None,
) -> Permutation:  # fmt: skip
    """Find or check the orders, then permute the model's state in place, all of it or nothing."""
    beside = _beside(model, optimizer)
    if isinstance(order, Mapping):
        orders = checked(axes, order)
    elif order == "random":
        orders = random_orders(axes, seed)
    elif order == "search":
        assert found.plan is not None
        orders = search_orders(model, axes, found.plan, seed=seed, budget_s=budget_s)
    else:
        raise NMError(f'order={order!r}: use "search", "random", or a mapping from axes to orders')
    before = _retained(model, found.plan)
    gm = next(iter(found.graphs.values()))[0]
    permute_pass(gm, axes=axes, orders=orders, beside=beside)
    after = _retained(model, found.plan)
    return Permutation(orders, axes, {name: (share, after[name]) for name, share in before.items()})


def captured_and_planned(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None, pattern: PatternSpec | None,
    include: Sequence[str], exclude: Sequence[str], dynamic_shapes: Any, what: str,
) -> Captured:  # fmt: skip
    from nm_compiler.api import _arguments, _check_model, _globs, _normal
    from nm_compiler.capture import capture

    _check_model(model)
    args = _arguments(example_inputs, kwargs)
    args, named = pytree.tree_map_only(Tensor, _normal, (args, dict(kwargs or {})))
    graphs = capture(model, args, named, dynamic_shapes)
    plan = None
    if pattern is not None:
        plan = find(
            model,
            [gm for gm, _ in graphs.values()],
            PatternMap.parse(pattern),
            include=_globs(include),
            exclude=_globs(exclude),
        )
    return Captured(graphs, plan, layouts([gm for gm, _ in graphs.values()], model))


def _beside(model: nn.Module, optimizer: Optimizer | None) -> list[tuple[str, Tensor]]:
    """The tensors of the optimizer's state that have an entry for every entry of their parameter."""
    if optimizer is None:
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not known & set(names):
        raise NMError("optimizer= has none of this model's parameters: build it from model.parameters()")
    return [
        (names[id(parameter)], value)
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if id(parameter) in names and isinstance(value, Tensor) and value.shape == parameter.shape
    ]


def _retained(model: nn.Module, plan: Plan | None) -> dict[str, float]:
    found = {}
    for site in plan.sites if plan else ():
        weight = model.get_parameter(site.name).detach()
        total = weight.abs().sum(dtype=torch.float64)
        kept = weight.mul(magnitude_mask(weight, site.pattern.n, site.pattern.m, site.in_axis)).abs().sum(dtype=torch.float64)
        found[site.name] = float(kept / total) if total else 1.0
    return found
