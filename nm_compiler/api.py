"""compile, freeze and show: capture -> passes -> carrier, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from nm_compiler.axes.outputs import Outputs
from nm_compiler.capture.exported import Exported
from nm_compiler.capture.preparing import captured, check_model, globs
from nm_compiler.capture.ranks import asked_alone
from nm_compiler.capture.routes import check_outside
from nm_compiler.carrier import Carrier
from nm_compiler.errors import NMError
from nm_compiler.evaluate import value_of
from nm_compiler.graph import run
from nm_compiler.importance import check_names, importance_of
from nm_compiler.links import check_hooks
from nm_compiler.methods.base import Method
from nm_compiler.methods.bimask import BiMask
from nm_compiler.methods.magnitude import Magnitude
from nm_compiler.module import SparseModule
from nm_compiler.passes.freeze_masks import masked_values
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.permuting import Order, reorder
from nm_compiler.recipe import freezing, pipeline
from nm_compiler.rewrite import masked_nodes
from nm_compiler.sites.plan import Plan, Site, check_globs, find
from nm_compiler.solvers.check import worst_group
from nm_compiler.state.attaching import attach_state, detach_state
from nm_compiler.state.averaged import COPY_THEM
from nm_compiler.state.beside import Weight, learns
from nm_compiler.state.sharding import is_sharded, sharded_freeze
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
    if example_inputs is None and not kwargs:
        told = {"permute": permute, "budget_s": budget_s, "outputs": outputs, "dynamic_shapes": dynamic_shapes}
        for name, value in told.items():
            if value is not None:
                raise NMError(f"{name}={value!r} needs a graph: give nm.compile example inputs, such as (x,)")
        named = {"include": globs(include), "exclude": globs(exclude)}
        return _prepare(model, method, patterns, **named, seed=seed, then=then or "inductor")
    if then is not None:
        raise NMError(f"then={then!r} is for nm.compile(model) without example inputs; torch.compile what this returns")
    if permute is None and method.folds:
        permute = "search"
    if permute is None and (budget_s is not None or outputs is not None):
        raise NMError('budget_s= and outputs= are about the permutation: say permute="search" too')
    with asked_alone() as alone:
        routes = captured(model, example_inputs, kwargs, dynamic_shapes, what="nm.compile")
    check_outside(model, routes, patterns, globs(include), globs(exclude))
    notes = check_hooks(model) if isinstance(routes[True], Exported) else ()
    plan = find(model, [route.whole for route in routes.values()], patterns, include=globs(include), exclude=globs(exclude))
    _check_weights(model, plan.sites, method)
    moved, chosen = None, method
    if permute is not None:
        kept = _importances(model, plan, method)
        options: dict[str, Any] = {"budget_s": budget_s, "backward": method.backward_share, "importance": kept or None}
        moved = reorder(model, routes, plan, permute, outputs, seed=seed, along=kept, **options)
        chosen = replace(method, importance=kept) if kept and isinstance(method, Magnitude) else method
    attach_state(model, plan, chosen)
    try:
        for route in routes.values():
            route.rewrite(pipeline(method, plan.sites), plan)
        notes = (*(() if moved is None else moved.notes), *notes)
        return SparseModule(model, routes, plan, method, seed, notes=notes, alone=tuple(alone))
    except BaseException:
        detach_state(model, plan, method)
        if moved is not None:
            moved.undo(model)
        raise


def freeze(sparse: nn.Module, *, finish: bool = False) -> nn.Module:
    """Write the masks into the weights and give back the user's own module, its state_dict plain and exactly N:M.

    sparse: what `compile` returned, also inside DDP or ``torch.compile``; it cannot be used afterwards.
    finish: decide at once what training has not decided yet (LBC before t_f).

    Returns the module that was given to `compile`, the method's state taken off it.
    Raises NMError, nothing changed, if masks are undecided and not ``finish``, or if a weight is in shards or not finite.
    """
    module = unwrap(sparse)
    if module.frozen:
        raise NMError("this model is frozen already: use what the first nm.freeze returned")
    weights = module.ready()
    cut = next((weight for weight in weights if is_sharded(weight.param)), None)
    if cut is not None:
        raise sharded_freeze(cut.site)
    _check_finite({weight.site.name: weight.param for weight in weights})
    open_ones = [weight for weight in weights if not module.method.is_settled(weight)]
    if open_ones and not finish:
        raise _undecided(module, open_ones, len(weights))
    state = [weight[suffix] for weight in weights for suffix in module.method.suffixes(weight.site)]
    before = [(tensor, tensor.detach().clone()) for tensor in state if not learns(tensor)]
    for weight in open_ones:
        module.method.settle(weight)
    try:
        _check_settled(module.method, open_ones)
        _check_masks(module)
    except NMError:
        for tensor, value in before:
            tensor.copy_(value)
        raise
    values: dict[int, Tensor] = {}
    for gm in module.programs():
        masked_values(gm, values)
    for gm in module.programs():
        run(gm, freezing(module.plan.sites, values))
    module.retire()
    model: nn.Module = module.origin
    return model


def show(sparse: nn.Module, *, training: bool = False) -> str:
    """The rewritten graph of a mode as a program: one node a line, with dtype and shape.

    sparse: what `compile` returned, also inside DDP or ``torch.compile``; training: the mode, evaluation by default.
    A mode that runs in fragments shows all that have run so far, in the order in which they were first met.
    Raises NMError for a model that was not compiled, and for a live one before its first call.
    """
    return unwrap(sparse).text(training)


def _undecided(module: Carrier, open_ones: Sequence[Weight], count: int) -> NMError:
    """What to say where some of ``count`` weights are not N:M yet."""
    first = open_ones[0].site
    why = (module.method.remark(open_ones[0]) or "its mask is not decided").removeprefix("training: ")
    return NMError(
        f"{len(open_ones)} of {count} weights are not {first.pattern} yet (first {first.name} of shape "
        f"{list(first.shape)}): {why}. {_how_far(module)}, or "
        "nm.freeze(sparse, finish=True) decides now, at a cost in accuracy"
    )


def _how_far(module: Carrier) -> str:
    """How to go on until masks are decided."""
    if module.copy_known is not None and not (module.progress and module.progress[0]):
        return f"No SparsityScheduler has stepped this copy of the model that trains. {COPY_THEM}, then freeze it"
    if module.progress is None:
        return "No SparsityScheduler was made for this model: train with one"
    step, total = module.progress
    if step == 0:
        return f"Its SparsityScheduler has counted none of {total} steps: call its step() after every optimizer.step()"
    if step == total:
        return f"All {total} steps are over, so this state was loaded from before masks are decided: load some from after that"
    return f"Its SparsityScheduler has counted {step} of {total} steps: train on"


def _check_settled(method: Method, weights: Sequence[Weight]) -> None:
    for weight in weights:
        if not method.is_settled(weight):
            raise NMError(
                f"{weight.site.name} of shape {list(weight.site.shape)} is not {weight.site.pattern} after "
                f"{method.name}.settle(): that has to decide what {method.name}.is_settled() asks for"
            )


def _check_masks(module: Carrier) -> None:
    """Every mask is exactly N:M, checked before the first weight is written."""
    programs = module.programs()
    for weight in module.ready():
        site = weight.site
        for gm in programs:
            for node in masked_nodes(gm, site.name):
                fullest = worst_group(value_of(gm, node), site.pattern.m, site.in_axis)
                if fullest > site.pattern.n:
                    raise NMError(
                        f"{site.name} of shape {list(site.shape)}: its mask keeps {fullest} of {site.pattern.m} in a "
                        f"group, not {site.pattern}, although {module.method.name}.is_settled() says so: either that is "
                        "wrong, or the state beside it was edited, and a healthy checkpoint has to be loaded"
                    )


def _prepare(
    model: M, method: Method, patterns: PatternMap, *, include: tuple[str, ...], exclude: tuple[str, ...], seed: int, then: str
) -> M:
    """`compile` without example inputs: the model itself, with the state of its weights and entries for its calls.

    Raises NMError, the model unchanged, if nothing can be N:M.
    """
    from nm_compiler.backend import check_then
    from nm_compiler.live.prepared import Prepared

    if method.folds:
        raise NMError(
            f"{method} puts channels in another order, which needs a graph: nm.permute(model, (x,)) first, or inputs"
        )
    check_then(then)
    check_model(model, "nm.compile")
    check_globs(model, patterns, include, exclude)
    made = Prepared(model, method, patterns, include=include, exclude=exclude, seed=seed, then=then)
    if not made.candidates:
        raise NMError(
            f"no weight of this {type(model).__name__} can be {patterns}: none of its layers has inputs that M divides, "
            "or exclude= names them all"
        )
    _check_weights(model, made.candidates.values(), method)
    made.attach()
    return model


def _importances(model: nn.Module, plan: Plan, method: Method) -> dict[str, Tensor]:
    """What one-shot masks go by, by weight, in memory of its own: it was measured in the order before a permutation."""
    if not isinstance(method, Magnitude) or method.importance is None:
        return {}
    return {s.name: importance_of(method.importance, s, model.get_parameter(s.name)).detach().clone() for s in plan.sites}


def _check_weights(model: nn.Module, sites: Collection[Site], method: Method) -> None:
    """Raise NMError for a weight that the method cannot take, or whose values it could not compare."""
    check_names(getattr(method, "importance", None), model)
    _check_finite({site.name: model.get_parameter(site.name) for site in sites})
    for site in sites:
        method.check(site)


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_meta:  # no values to look at
            continue
        extremes = torch.stack(torch.aminmax(weight.detach())) if weight.numel() else weight.new_zeros(2)
        if not bool(torch.isfinite(extremes).all()):  # NaN wins both; a mask of the whole weight would cost memory
            wrong = int((~torch.isfinite(weight.detach())).sum())
            raise NMError(
                f"{name} of shape {list(weight.shape)} has {wrong} NaN or infinite values: magnitudes cannot be compared; "
                "load a healthy checkpoint or lower the learning rate"
            )
