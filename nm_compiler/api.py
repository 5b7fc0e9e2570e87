"""compile and show: capture -> passes -> carrier. The way back is `nm_compiler.freezing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from nm_compiler.alone import unwatch
from nm_compiler.axes.outputs import Outputs
from nm_compiler.capture.exported import Exported
from nm_compiler.capture.preparing import captured, globs
from nm_compiler.capture.ranks import asked_alone
from nm_compiler.capture.routes import check_outside
from nm_compiler.capture.turns import in_turn
from nm_compiler.errors import NMError
from nm_compiler.importance import importance_of
from nm_compiler.links import check_hooks
from nm_compiler.methods.base import Method
from nm_compiler.methods.bimask import BiMask
from nm_compiler.methods.magnitude import Magnitude
from nm_compiler.module import SparseModule
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.permuting import Order, reorder
from nm_compiler.recipe import pipeline
from nm_compiler.sites.plan import Plan, find
from nm_compiler.state.attaching import attach_state, check_weights, detach_state, state_names
from nm_compiler.state.beside import check_free
from nm_compiler.unwrapping import unwrap

M = TypeVar("M", bound=nn.Module)


@overload
def compile(
    model: M,
    *,
    pattern: PatternSpec = "2:4",
    method: Method | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    then: str = "inductor",
) -> M: ...


@overload
def compile(
    model: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    pattern: PatternSpec = "2:4",
    method: Method | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    permute: Order | None = None,
    budget_s: float | None = None,
    outputs: Outputs = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
) -> SparseModule: ...


@torch.inference_mode(False)  # state made of inference tensors could never be trained
@in_turn
def compile(
    model: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    pattern: PatternSpec = "2:4",
    method: Method | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    permute: Order | None = None,
    budget_s: float | None = None,
    outputs: Outputs = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    then: str | None = None,
) -> Any:
    """Capture ``model`` and give its weights what they need to train as N:M.

    example_inputs: a tuple of positional inputs (or one tensor); kwargs: keyword inputs. Without either the model itself
    is prepared and returned, and TorchDynamo takes its graphs at its calls (docs/torch-compile.md). The batch (axis 0) becomes
    dynamic; pass ``dynamic_shapes`` as to `torch.export.export` for other axes.
    model: on one device; on the meta device it is planned and rewritten without values, see `SparseModule.to_empty`.
    pattern: ``"2:4"``, ``(2, 4)``, or globs over parameter names, first match wins: ``{"layer4.*": "1:4", "*": "2:4"}``.
    method: `BiMask` (the default), `LBC`, `SRSTE`, `Magnitude`, `Transposable`, `LBCBiMask`, `Gradual` or `SSTE`.
    include, exclude: globs over parameter names; include also takes in stem, head and routers, dense otherwise.
    permute: ``"search"`` puts channels in an order in which the masks keep more, before anything else; ``"random"`` or a
    mapping are for experiments. The search minds backward masks as well where the method needs that (`Transposable`,
    ``BiMask(fold=True)``), and keeps what ``Magnitude(importance=)`` goes by, which moves along. budget_s (seconds) and
    outputs (which must not change) as in `nm_compiler.permute`.
    seed: of the search, and of everything the method draws at random.
    then: without example inputs, what runs the rewritten graphs: ``"inductor"`` (the default), ``"aot_eager"``, ``"eager"``.

    Returns a `SparseModule`, which shares the model's parameters; the method's state is registered on the model in
    place, and `freeze` removes it. Build the optimizer afterwards, from ``sparse.parameters()``.
    Raises NMError, the model unchanged, if it cannot be captured or no weight is left to make sparse.
    """
    patterns = PatternMap.parse(pattern)
    method = BiMask() if method is None else method
    pipeline(method, ())  # an unknown method is refused before anything else happens
    if not hasattr(seed, "__index__"):
        raise NMError(f"seed={seed!r}: needs a whole number; the method draws by it while it trains")
    named: dict[str, Any] = {"include": globs(include), "exclude": globs(exclude)}
    if example_inputs is None and not kwargs:
        told = {"permute": permute, "budget_s": budget_s, "outputs": outputs, "dynamic_shapes": dynamic_shapes}
        for name, value in told.items():
            if value is not None:
                raise NMError(f"{name}={value!r} needs a graph: give nm.compile example inputs, such as (x,)")
        from nm_compiler.live.preparing import prepare

        return prepare(model, method, patterns, **named, seed=seed, then=then or "inductor")
    if then is not None:
        raise NMError(f"then={then!r} is for nm.compile(model) without example inputs; torch.compile what this returns")
    if permute is None and method.folds:
        permute = "search"
    if permute is None and (budget_s is not None or outputs is not None):
        raise NMError('budget_s= and outputs= are about the permutation: say permute="search" too')
    with asked_alone() as alone:
        routes = captured(model, example_inputs, kwargs, dynamic_shapes, what="nm.compile")
    check_outside(model, routes, patterns, **named)
    notes = check_hooks(model) if isinstance(routes[True], Exported) else ()
    plan = find(model, [route.whole for route in routes.values()], patterns, **named)
    check_weights(model, plan.sites, method)
    check_free(model, state_names(plan, method))
    moved, chosen = None, method
    try:
        if permute is not None:
            kept = _importances(model, plan, method)
            options: dict[str, Any] = {"budget_s": budget_s, "backward": method.backward_share, "importance": kept or None}
            moved = reorder(model, routes, plan, permute, outputs, seed=seed, along=kept, **options)
            chosen = replace(method, importance=kept) if kept and isinstance(method, Magnitude) else method
        attach_state(model, plan, chosen)
        for route in routes.values():
            route.rewrite(pipeline(method, plan.sites), plan)
        notes = (*(() if moved is None else moved.notes), *notes)
        return SparseModule(model, routes, plan, method, seed, notes=notes, alone=tuple(alone))
    except BaseException:
        detach_state(model, plan, method)
        unwatch(model)
        if moved is not None:
            moved.undo(model)
        raise


def show(sparse: nn.Module, *, training: bool = False) -> str:
    """The rewritten graph of a mode as a program: one node a line, with dtype and shape.

    sparse: what `compile` returned, also inside DDP or ``torch.compile``; training: the mode, evaluation by default.
    A mode that runs in fragments shows all that have run so far, in the order in which they were first met.
    Raises NMError for a model that was not compiled, and for a live one before its first call.
    """
    return unwrap(sparse).text(training)


def _importances(model: nn.Module, plan: Plan, method: Method) -> dict[str, Tensor]:
    """What one-shot masks go by, by weight, in memory of its own: it was measured in the order before a permutation."""
    if not isinstance(method, Magnitude) or method.importance is None:
        return {}
    return {s.name: importance_of(method.importance, s, model.get_parameter(s.name)).detach().clone() for s in plan.sites}
