"""The law behind every permutation: permute all that is free, and the outputs stay; undo any one axis, and they change.

Checked on a copy of the model with every weight and buffer perturbed (fresh models hide errors behind zeros and ones), in
float64, on the captured graph with its explicit float32 casts lifted; in float32 where an op has no double kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from nm_compiler.axes.analyse import analyse
from nm_compiler.axes.outputs import Outputs, chosen
from nm_compiler.axes.reorder import inverse, needs_of, random_order, reorder
from nm_compiler.axes.result import Axes, Leaf, leaves
from nm_compiler.capture.export import capture, capture_mode
from nm_compiler.capture.signature import Signature
from nm_compiler.errors import NMError
from nm_compiler.passes.permute import permute
from nm_compiler.wording import dtype_name

BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5}
"""Largest relative error of an equal function, by precision."""


@dataclass(frozen=True, slots=True)
class Law:
    """What was seen.

    error: largest relative difference of an output that matters, after a random order of every free class; dtype: of the
    check; undone: axes of weights and buffers that were put back one at a time; undetected: those of them that changed no
    output although their tensor does matter. Lawful: ``error`` within bounds, nothing undetected.
    """

    error: float
    dtype: torch.dtype
    axes: Axes
    undone: int
    undetected: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the function stayed, and no undone axis went unnoticed."""
        return self.error < BOUNDS[self.dtype] and not self.undetected

    def __str__(self) -> str:
        name = dtype_name(self.dtype)
        text = f"relative error {self.error:.1e} in {name} with {len(self.axes.free)} of {len(self.axes)} classes permuted"
        return text + f", {self.undone} axes undone, {len(self.undetected)} undetected {list(self.undetected[:8])}"


def permutation_law(
    model: nn.Module,
    example_inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    undo: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Law:
    """Check the law on a copy of ``model`` in evaluation mode; the model itself is left alone.

    outputs: those that must stay, as in `nm_compiler.permute`; undo: how many axes to put back one at a time, drawn at random
    (None: all of them, each costs a run of the model). Raises NMError if the outputs change from run to run.
    """
    work = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    perturb(work, generator)
    args, named = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t,
                                       (example_inputs, dict(kwargs or {})))  # fmt: skip
    try:
        captured = capture(work, args, named)
    except NMError:  # training may go through fragments: what is permuted is then judged by evaluation alone, as in nm.permute
        captured = {False: capture_mode(work, args, named, None, training=False)}
    gm, signature = captured[False]
    axes = analyse(work, list(captured.values()), layouts={}, outputs=outputs)
    if dtype == torch.float64:
        _lift_casts(gm)
    try:
        run = _runner(work, gm, signature, args, named, outputs)
        before = run()
    except (RuntimeError, NotImplementedError):
        if dtype != torch.float64:
            raise
        return permutation_law(model, example_inputs, kwargs, outputs=outputs, undo=undo, seed=seed, dtype=torch.float32)
    if _difference(before, run()) != 0:
        raise NMError(
            f"the outputs of {type(model).__name__} change from run to run in eval(): it draws random numbers or "
            "keeps state, so no permutation can be checked on it. Make it deterministic in eval(), or choose other outputs="
        )
    orders = {each.name: random_order(each, generator) for each in axes.free}
    permute(gm, axes=axes, orders=orders)
    error = _difference(before, run())
    places = list(_places(axes, orders))
    if undo is not None and undo < len(places):
        places = [places[i] for i in torch.randperm(len(places), generator=generator)[:undo].tolist()]
    # deep nets damp what an early layer does: a change counts from well above the rounding that was just seen
    threshold = min(BOUNDS[dtype], 30 * max(error, torch.finfo(dtype).eps))
    missed = [
        f"{name}[{axis}]" for name, axis in places if not _noticed(work, axes, orders, name, axis, run, threshold, generator)
    ]
    return Law(error, dtype, axes, len(places), tuple(missed))


@torch.no_grad()
def perturb(model: nn.Module, generator: torch.Generator) -> None:
    """Make all entries of every parameter and floating buffer in the state_dict different; variances stay positive."""
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            draw = torch.randn if isinstance(tensor, nn.Parameter) else torch.rand
            tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
            tensor.add_(0.02 * draw(tensor.shape, generator=generator, dtype=tensor.dtype))


def _lift_casts(gm: GraphModule) -> None:
    """float32 that a model asks for by name becomes float64, subgraphs included."""
    for module in [gm, *(m for m in gm.__dict__.get("extras", {}).values() if isinstance(m, GraphModule))]:
        for node in module.graph.nodes:
            node.args, node.kwargs = pytree.tree_map_only(
                torch.dtype, lambda d: torch.float64 if d == torch.float32 else d, (node.args, node.kwargs)
            )
        module.recompile()


def _runner(
    model: nn.Module, gm: GraphModule, signature: Signature, args: Any, kwargs: Mapping[str, Any], outputs: Outputs
) -> Callable[[], list[Tensor]]:
    ((_, indices),) = chosen([signature.out_spec], outputs)

    @torch.no_grad()
    def run() -> list[Tensor]:
        model.eval()
        flat = gm(*signature.flatten(args, kwargs))
        return [flat[i].clone() for i in indices if isinstance(flat[i], Tensor)]

    return run


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest absolute difference, relative to the largest entry of its tensor. NaN that stays NaN is equal."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.is_floating_point():
            both = old.isfinite() & new.isfinite()
            if not torch.equal(old.isfinite(), new.isfinite()):
                return float("inf")
            gap = (old - new).masked_fill(~both, 0).abs().max() if old.numel() else torch.zeros(())
            scale = old.masked_fill(~both, 0).abs().max() if old.numel() else torch.ones(())
            worst = max(worst, float(gap / scale.clamp_min(torch.finfo(old.dtype).tiny)))
        elif not torch.equal(old, new):
            worst = float("inf")
    return worst


def _places(axes: Axes, orders: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Every axis of a parameter or buffer that was really put in another order by what is in it alone."""
    moved = set(_moved(axes, orders))
    needs = needs_of(axes)
    for name, layout in axes.state.items():
        for axis, expression in enumerate(layout):
            inside = {leaf.name for leaf in leaves(expression)}
            if any(leaf in moved and set(needs.get(leaf, ())) <= inside for leaf in inside):
                yield name, axis


def _moved(axes: Axes, orders: Mapping[str, Tensor]) -> Iterator[str]:
    """The classes of which one axis can be put back by itself: those that moved, and have more than one."""
    for each in axes.free:
        order = orders[each.name]
        if len(each.members) > 1 and not torch.equal(order, torch.arange(order.shape[-1]).expand_as(order)):
            yield each.name


@torch.no_grad()
def _noticed(
    model: nn.Module, axes: Axes, orders: Mapping[str, Tensor], name: str, axis: int, run: Callable[[], list[Tensor]],
    threshold: float, generator: torch.Generator,
) -> bool:  # fmt: skip
    """Put one axis back; did an output change? If not, the tensor must be one that no output depends on."""
    tensor, layout, needs = model.state_dict(keep_vars=True)[name], axes.state[name], needs_of(axes)
    kept, expected = tensor.detach().clone(), run()
    inside = {leaf.name for leaf in leaves(layout[axis])} & set(_moved(axes, orders))
    back = inverse({n: o for n, o in orders.items() if n in inside and set(needs.get(n, ())) <= inside}, needs)
    only = tuple(expression if i == axis else Leaf("", expression.size) for i, expression in enumerate(layout))
    undone = reorder(kept, only, back, needs)
    if torch.equal(undone, kept):  # all entries along the axis are equal
        return True
    tensor.copy_(undone)
    noticed = _difference(expected, run()) > threshold
    if not noticed:  # deep inside a net where little is left of it: the same with entries that differ far more
        strong = kept * torch.randn(kept.shape, generator=generator, dtype=kept.dtype).mul(1.5).exp()
        tensor.copy_(strong)
        apart = run()
        tensor.copy_(reorder(strong, only, back, needs))
        noticed = _difference(apart, run()) > threshold
        if not noticed:  # a key bias under softmax: its values do not matter, so no order of them does
            noticed = _difference(expected, apart) <= threshold
    tensor.copy_(kept)
    return noticed
