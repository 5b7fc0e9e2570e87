"""permute and show_axes: reorder the channels of a model so that N:M masks keep more, without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from nm_compiler.axes.analyse import analyse
from nm_compiler.axes.orders import checked, random_orders
from nm_compiler.axes.outputs import Outputs
from nm_compiler.axes.reorder import inverse, needs_of
from nm_compiler.axes.result import Axes
from nm_compiler.axes.search import Gain, search_orders
from nm_compiler.capture.export import in_mode
from nm_compiler.capture.exported import Exported
from nm_compiler.capture.preparing import Routes, captured, globs
from nm_compiler.capture.signature import Signature
from nm_compiler.capture.turns import in_turn
from nm_compiler.errors import NMError
from nm_compiler.importance import Importance, check_names
from nm_compiler.passes.permute import permute as permute_pass
from nm_compiler.passes.permute import permute_state
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.sites.plan import Plan, find
from nm_compiler.sites.uses import layouts
from nm_compiler.solvers.magnitude import magnitude_mask

Order = str | Mapping[str, Any]
"""``"search"``, ``"random"``, or orders by axis."""


@dataclass(frozen=True)
class Permutation(Mapping[str, Tensor]):
    """What `permute` did: an order, int64 ``[*rows, size]``, for every class of axes that it moved.

    retained: per N:M weight, the share of magnitude that its forward mask kept before, and keeps now.
    gains: per class that was searched, what its order is good for; the largest first.
    """

    orders: Mapping[str, Tensor]
    axes: Axes
    retained: Mapping[str, tuple[float, float]]
    gains: tuple[Gain, ...] = ()

    def inverse(self) -> dict[str, Tensor]:
        """The orders that put everything back: ``nm.permute(model, inputs, order=permutation.inverse())``."""
        return inverse(self.orders, needs_of(self.axes))

    def undo(self, model: nn.Module) -> None:
        """Put everything back in the model that was permuted."""
        permute_state(model, axes=self.axes, orders=self.inverse())

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        pinned = [f"no axis rule for {op}: it pinned {count} axes" for op, count in self.axes.unknown.items()]
        return (f"{len(self.orders)} of {len(self.axes)} axis classes were permuted.", *map(str, self.gains), *pinned)

    def __getitem__(self, name: str) -> Tensor:
        return self.orders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)

    def __str__(self) -> str:
        lines = [f"{len(self.orders)} of {len(self.axes)} axis classes permuted", *(f"  {gain}" for gain in self.gains)]
        lines += ["retained magnitude of each N:M weight:"]
        width = max(map(len, self.retained), default=0)
        lines += [f"  {name:{width}}  {before:.4f} -> {after:.4f}" for name, (before, after) in self.retained.items()]
        return "\n".join(lines)


@in_turn
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
    backward: float = 0.0,
    importance: Importance | None = None,
) -> Permutation:
    """Put the channels of ``model`` in another order, in place; it computes the same function.

    example_inputs, kwargs, dynamic_shapes: to capture the model with, as in `compile`.
    pattern, include, exclude: which weights the search has in mind, as there.
    order: ``"search"`` for the most retained magnitude, ``"random"``, or a mapping from axes (see `show_axes`) to orders,
    int64 ``[size]`` with ``new[i] = old[order[i]]``; what it does not name stays.
    outputs: those that must not change, as index, name, several, or a function of the outputs. By default all, but for models
    that name them, such as Hugging Face's, the logits and losses: other outputs are then right up to the order of channels.
    optimizer: whose state of the permuted parameters (momenta of their shape) goes along.
    seed: of the search and of random orders; budget_s: seconds of the search, on all cores; without it, a fixed amount of
    work that takes seconds and gives the same orders on every machine.
    backward: how much what a backward mask keeps (N:M along the output axis, after the forward mask) counts beside the
    forward mask, for `Transposable` or for Bi-Mask without gathers. `BiMask` finds an order of its own: 0 is right for it.
    importance: what to keep instead of magnitude: a rule such as `nm.Wanda`, or tensors by parameter name. It stays as it is,
    of the order it was measured in: calibrate again afterwards, or use ``nm.compile(permute=)``, which moves it along.

    The state_dict keeps its names and shapes, and loads into any model of the architecture.
    Raises NMError, nothing changed, if the model cannot be captured or an order does not fit.
    Reference: Pool & Yu, NeurIPS 2021.
    """
    check_names(importance, model)
    routes = captured(model, example_inputs, kwargs, dynamic_shapes, what="nm.permute")
    whole = [route.whole for route in routes.values()]
    plan = find(
        model, whole, PatternMap.parse(pattern), include=globs(include), exclude=globs(exclude), may_be_empty=order != "search"
    )
    options: dict[str, Any] = {"seed": seed, "budget_s": budget_s, "backward": backward, "importance": importance}
    return reorder(model, routes, plan, order, outputs, optimizer=optimizer, **options)


@in_turn
def show_axes(
    model: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    dynamic_shapes: Any = None,
) -> Axes:
    """Which axes of the model's weights one order must permute together, and which are pinned and why.

    example_inputs, kwargs, dynamic_shapes: to capture the model with, as in `compile`.
    outputs: those that must not change, as in `permute`.

    Returns a value to print, to iterate over and to ``draw("axes.svg")``. Nothing is changed; meta weights will do.
    Raises NMError if neither mode can be captured as one graph.
    """
    return coupled(model, captured(model, example_inputs, kwargs, dynamic_shapes, what="nm.show_axes"), outputs)


def coupled(model: nn.Module, routes: Routes, outputs: Outputs = None) -> Axes:
    """The coupled axes of a captured model, over the modes that are one graph. Raises NMError where none is."""
    graphs = _graphs(routes)
    return analyse(model, graphs, layouts=layouts([gm for gm, _ in graphs], model), outputs=outputs)


def reorder(
    model: nn.Module, routes: Routes, plan: Plan, order: Order, outputs: Outputs = None, *,
    optimizer: Optimizer | None = None, along: Mapping[str, Tensor] | None = None, seed: int = 0, **searching: Any,
) -> Permutation:  # fmt: skip
    """Find or check the orders, then permute the model's state in place, all of it or nothing.

    along: tensors of the shape of a parameter, by its name, that are permuted with it. searching: budget_s, backward and
    importance of `nm_compiler.axes.search.search_orders`. Raises NMError, nothing changed, for orders that do not fit.
    """
    if not isinstance(order, Mapping) and order not in ("search", "random"):
        raise NMError(f'order={order!r}: use "search", "random", or a mapping from axes to orders')
    beside = [*_beside(model, optimizer), *(along or {}).items()]
    axes, gains = coupled(model, routes, outputs), tuple[Gain, ...]()
    if isinstance(order, Mapping):
        orders = checked(axes, order)
    elif order == "random":
        orders = random_orders(axes, seed)
    else:
        orders, gains = search_orders(model, axes, plan, seed=seed, **searching)
    before = _retained(model, plan)
    gm, permuted = _graphs(routes)[0][0], False
    try:
        permute_pass(gm, axes=axes, orders=orders, beside=beside)
        permuted = True
        with in_mode(model, True):
            pass  # train() forgets what eval() has kept of the weights, in the order they had
        after = _retained(model, plan)
        return Permutation(orders, axes, {name: (share, after[name]) for name, share in before.items()}, gains)
    except BaseException:
        if permuted:
            permute_pass(gm, axes=axes, orders=inverse(orders, needs_of(axes)), beside=beside)
        raise


def _graphs(routes: Routes) -> list[tuple[GraphModule, Signature]]:
    whole = [(route.whole, route.signature) for route in routes.values() if isinstance(route, Exported)]
    if not whole:
        raise NMError(
            "neither mode of this model can be captured as one graph, so nothing is known about which axes are coupled: "
            "compile it without permute=, or rewrite the control flow on data that stops torch.export"
        )
    return whole


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


def _retained(model: nn.Module, plan: Plan) -> dict[str, float]:
    found = {}
    for site in plan.sites:
        weight = model.get_parameter(site.name).detach()
        total = weight.abs().sum(dtype=torch.float64)
        kept = weight.mul(magnitude_mask(weight, site.pattern.n, site.pattern.m, site.in_axis)).abs().sum(dtype=torch.float64)
        found[site.name] = float(kept / total) if total else 1.0
    return found
