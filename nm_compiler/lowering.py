"""nm.lower: from a frozen model to a runtime.

    model --copy, cast--> capture --bias_apart, fold_batchnorm, .., batch_of_one (`passes`)--> one plain graph
          --backend--> what runs it --check against the model--> Lowered

The orders that `permute` found need no pass here: they are in the weights since then. After every pass the constants are
checked to be N:M along their reduction axis. The model itself is not touched.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from nm_compiler.capture.counted import nothing_counted
from nm_compiler.capture.export import capture_mode, in_mode, without_cache
from nm_compiler.capture.preparing import arguments, check_model, check_normal, globs, normal
from nm_compiler.capture.regions import without_switches
from nm_compiler.capture.routes import called, copies_of, undone
from nm_compiler.capture.turns import in_turn
from nm_compiler.errors import NMError
from nm_compiler.graph import Pass, run, standalone
from nm_compiler.memory import give_back
from nm_compiler.passes.batch_of_one import batch_of_one
from nm_compiler.passes.bias_apart import bias_apart
from nm_compiler.passes.einsum_to_linear import einsum_to_linear
from nm_compiler.passes.flatten_tokens import flatten_tokens
from nm_compiler.passes.fold_batchnorm import fold_batchnorm
from nm_compiler.passes.fold_weights import fold_weights
from nm_compiler.passes.products_to_linear import products_to_linear
from nm_compiler.passes.spell_out_autocast import spell_out_autocast
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.runtime.backends import Job, choose_backend
from nm_compiler.runtime.facts import facts
from nm_compiler.runtime.lowered import Lowered, relative_error
from nm_compiler.runtime.products import check_zeros, unread
from nm_compiler.scaled import keep
from nm_compiler.sites.plan import Plan, Site, check_globs, find
from nm_compiler.solvers.check import worst_group
from nm_compiler.sparser import sparser_note
from nm_compiler.unwrapping import is_compiled
from nm_compiler.wording import dtype_name
from nm_compiler.written import as_before, mark, own

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of the check after lowering: relative, in the norm of every output."""


_RANKS = ("topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "nonzero", "multinomial")
"""Ops behind which a small difference can be a large one."""


@in_turn
def lower(
    model: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str = "auto",
    pattern: PatternSpec = "2:4",
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
    force: Sequence[str] = (),
    check: bool = True,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Lowered:
    """Hand a frozen model to a runtime that multiplies with N:M weights, and say for each weight whether it does.

    model: what `freeze` returned, or any model whose weights are N:M; on the device it shall run on. It stays as it is.
    example_inputs, kwargs, dynamic_shapes: as for `compile`; batch and dtype are those that speed is measured with.
    backend: ``"tensorrt"``, ``"cusparselt"``, ``"cpu"``, ``"onnx"``, ``"dense"`` (the same graph without sparse kernels), or
    ``"auto"``: the CPU kernels for a model on a CPU, else the first of TensorRT and cuSPARSELt that works here, else dense,
    with the reasons in the report.
    pattern: which weights to look for, as for `compile`; those that are not N:M stay dense, and the report says so.
    dtype: cast the copy to it; TensorRT and cuSPARSELt have sparse kernels for float16 and bfloat16 only.
    exclude, force: globs over parameter names: leave dense; run sparse without measuring that it is faster.
    check: compare with the model on the example inputs once, in the norm of each output.
    options: of the backend: ``{"path": "model.onnx"}``, those of `nm_compiler.runtime.tensorrt.build`, ...

    What is neither cast nor packed shares its memory with the model, but for what forward() writes to: lower a copy, if you go
    on training.
    Returns a `Lowered` module, called as the model is, in evaluation mode. Raises NMError, nothing changed, if the model was
    not frozen, cannot be one graph in evaluation mode, has no N:M weight, or computes something else afterwards.
    """
    lowered = lower_over(
        model, example_inputs, kwargs, backend=backend, pattern=pattern, dtype=dtype, exclude=exclude, force=force,
        check=check, dynamic_shapes=dynamic_shapes, options=options,
    )  # fmt: skip
    own(lowered.run)
    return lowered


def lower_over(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None, *, backend: str, pattern: PatternSpec,
    exclude: Sequence[str], force: Sequence[str], check: bool, dynamic_shapes: Any, options: Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
) -> Lowered:  # fmt: skip
    """As `lower`, but that what the graph writes to is still the model's, unless it was cast."""
    check_frozen(model)
    if dtype is None and not torch.is_inference_mode_enabled():
        check_normal(model, "nm.lower")
    args, named = arguments(example_inputs, kwargs, "nm.lower"), dict(kwargs or {})
    args, named = pytree.tree_map_only(Tensor, normal, (args, named))
    patterns = PatternMap.parse(pattern)
    check_globs(model, patterns, (), globs(exclude), globs(force))
    chosen = choose_backend(backend, dtype or _dtype(model), _device(model))
    wanted = _wanted(model, args, named) if check else None
    give_back()
    twin = cast(model, dtype)
    given = pytree.tree_map_only(Tensor, partial(_as, dtype=dtype), (args, named))
    again, way_out = partial(called, twin, given[0], given[1]), ", or say check=False if every call begins anew"
    kept = nothing_counted(twin, again, False, numbers=False, way_out=way_out) if check else contextlib.nullcontext()
    with undone(twin), kept, _parts_may_do():
        gm, signature = capture_mode(twin, given[0], given[1], dynamic_shapes, training=False)
    gm = run(gm, [spell_out_autocast, without_switches, mark])
    plan, sites, dense = _planned(twin, gm, patterns, globs(exclude))
    notes = (*chosen.notes, *(sparser_note(twin, sites.values()) if chosen.any_pattern else ()))
    gm = _rewritten(gm, sites, model, own=twin is not model)
    if not chosen.later:
        keep(gm)
    flat = tuple(signature.flatten(*copies_of(given)))  # a graph may write to its inputs, as static caches are
    job = Job(gm, signature, sites, flat, globs(force), dict(options or {}))
    lost = unread(gm, sites)
    with as_before(gm), torch.autocast(_device(model).type, enabled=False):  # in which dense products would be timed
        result = chosen.lower(job)
    lowered = Lowered(
        result, title=type(model).__name__, backend=chosen.name, signature=signature, plan=plan, sites=sites,
        dense=dense, unread=lost, dtype=dtype, notes=notes, attributes=facts(model),
    )  # fmt: skip
    del gm, job, flat  # copies of the examples among it
    give_back()
    if check:
        if wanted is None:
            with undone(model), in_mode(model, False), _plainly(model):
                wanted = model(*args, **{**signature.hidden, **named})
        coarser = max((dtype or _dtype(model), _dtype(model)), key=lambda each: TOLERANCE.get(each, 0.0))  # float32 of float16
        with as_before(lowered.run):
            _check(lowered, wanted, given, coarser)
        give_back()
    if chosen.for_files and twin is model:  # whose weights are there anyway; casts would keep a model alive
        lowered.__dict__["settled"] = False
    else:
        keep(lowered)  # now that nothing else needs memory any more
    return lowered


def passes(exact: Mapping[str, Tensor], *, own: bool = False) -> list[Pass]:
    """What every backend gets, in order. exact: values to fold batch norms with before rounding.

    own: the graph reads a copy that only it has: weights that a pass replaces are let go one by one.
    """
    return [
        bias_apart, partial(fold_batchnorm, exact=exact, own=own, later=True), partial(einsum_to_linear, own=own),
        partial(fold_weights, own=own), partial(products_to_linear, own=own), flatten_tokens, batch_of_one,
    ]  # fmt: skip


def cast(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of ``model`` with floating-point parameters and buffers of ``dtype``; the model itself for None.

    Values are cast one by one while copying, so that there is never a second copy in the old dtype. Raises NMError for a dtype
    that is not floating point.
    """
    if dtype is None:
        return model
    if not dtype.is_floating_point:
        raise NMError(
            f"dtype={dtype}: choose float16, bfloat16, float32 or float64; 8-bit needs scales, which a quantiser finds"
        )
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        kept = parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()
        memo[id(parameter)] = nn.Parameter(kept, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return copy.deepcopy(model, memo)


def check_frozen(model: Any) -> None:
    """Raise NMError for what `lower` cannot take: a model that trains, is lowered already or has no values."""
    if isinstance(model, Lowered):
        raise NMError(f"this {model.title} is lowered already, to {model.backend}: lower the model that it was made of")
    if is_compiled(model):
        if getattr(model, "frozen", False) is True:
            raise NMError("lower what nm.freeze returned, the plain model, not the compiled one it was made of")
        raise NMError("this model still trains: model = nm.freeze(sparse) first, then nm.lower(model, ...)")
    check_model(model, "nm.lower")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise NMError("this model is on the meta device: load its weights first, there are no zeros to look at")


def _planned(
    model: nn.Module, gm: GraphModule, patterns: PatternMap, exclude: Sequence[str]
) -> tuple[Plan, dict[str, Site], dict[str, str]]:
    """The plan, the weights that are N:M, stem and head too, and the reasons of the others. Raises NMError if none is."""
    everything = [name for name, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()]
    plan = find(model, [gm], patterns, include=everything, exclude=exclude, may_be_empty=True)
    sites, dense = _sparse_sites(model, plan)
    if not sites:
        wanted = " or ".join(dict.fromkeys(str(pattern) for _, pattern in patterns.rules))
        raise NMError(
            f"no weight of this {type(model).__name__} is {wanted}: nothing to lower. Train it with nm.compile and "
            f"nm.freeze it, or say pattern=. {_first(dense)}"
        )
    return plan, sites, dense


def _rewritten(gm: GraphModule, sites: Mapping[str, Site], model: nn.Module, *, own: bool) -> GraphModule:
    """The graph that every backend gets, by itself. own: it reads a copy of ``model``, whose values were rounded."""
    exact = {**dict(model.named_parameters()), **dict(model.named_buffers())} if own else {}
    for name in sites:
        for node in gm.graph.find_nodes(op="get_attr", target=name):
            node.meta["weight"] = name
    for each in passes(exact, own=own):
        gm = _checked(run(gm, [each]), sites, each)
    return standalone(gm)


def _sparse_sites(model: nn.Module, plan: Plan) -> tuple[dict[str, Site], dict[str, str]]:
    """Planned weights that really are N:M, by name, and the reasons of all others."""
    sites, dense = {}, {refusal.where: refusal.reason for refusal in plan.refusals}
    for site in plan.sites:
        weight = model.get_parameter(site.name).detach()
        fullest = worst_group(weight, site.pattern.m, site.in_axis)
        if fullest <= site.pattern.n:
            sites[site.name] = site
        else:
            dense[site.name] = (
                f"not {site.pattern}: a group of {site.pattern.m} along axis {site.in_axis} has {fullest} non-zeros"
            )
    return sites, dense


def _checked(gm: GraphModule, sites: Mapping[str, Site], done: Pass) -> GraphModule:
    wrong = check_zeros(gm, sites)
    if wrong is not None:
        name = getattr(done, "__name__", None) or getattr(getattr(done, "func", None), "__name__", "a pass")
        raise NMError(f"after {name}: {wrong}. This is a fault of nm_compiler: please report it with this message")
    return gm


def _wanted(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The model's outputs, before there is a copy of anything; None if it does not run: capture says why, with the line."""
    with undone(model), in_mode(model, False), _plainly(model), contextlib.suppress(Exception):
        return model(*copies_of(args), **{**without_cache(model, kwargs), **copies_of(dict(kwargs))})
    return None


@contextlib.contextmanager
def _parts_may_do() -> Iterator[None]:
    """What else there is for a model that is no one graph."""
    try:
        yield
    except NMError as error:
        if error.__cause__ is None:
            raise
        raise NMError(f"{error}\nOr lower parts that are graphs: nm.lower_parts(model, parts, run).") from error.__cause__


@contextlib.contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Op by op, as the graph has it: no autocast, no fused encoders of torch, which write zeros where inputs are padded."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.autocast(_device(model).type, enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _check(lowered: Lowered, wanted: Any, given: Any, dtype: torch.dtype) -> None:
    args, kwargs = copies_of(given)
    with _plainly(lowered):
        found = lowered(*args, **kwargs)
    pairs = zip(_floats(found), _floats(wanted), strict=False)
    sizes = next(((list(mine.shape), list(other.shape)) for mine, other in pairs if mine.shape != other.shape), None)
    if sizes is not None:
        raise NMError(
            f"lowered to {lowered.backend}, an output has sizes {sizes[0]}, and the model's has {sizes[1]}: if chance or "
            "rounding decides on sizes, as in speech synthesis, say check=False"
        )
    error = relative_error(found, wanted)
    bound = max(TOLERANCE.get(dtype, 6e-2), lowered.result.rough)
    if not error <= bound and not all(bool(each.isfinite().all()) for each in _floats(wanted)):
        raise NMError(
            f"the model itself, before it is lowered to {lowered.backend}, has outputs that are not finite on these inputs: "
            "look for NaN in its weights, give other inputs, or say check=False"
        )
    if not error <= bound:
        raise NMError(
            f"lowered to {lowered.backend}, the outputs differ from the model's by {error:.2g} (relative; up to {bound:.2g} "
            f"is normal for {dtype_name(dtype)}). Try dtype=torch.bfloat16 or float32 if values overflow, "
            f"exclude=[...] to find the layer, or check=False if you know better{_ranked(lowered)}"
        )
    lowered.__dict__["error"] = error


def _ranked(lowered: Lowered) -> str:
    """What else may be the matter, if outputs follow the order of results: of a detector's best queries, say."""
    nodes = lowered.result.run.graph.nodes if isinstance(lowered.result.run, GraphModule) else ()
    found = sorted({name for node in nodes if (name := getattr(node.target, "_opname", "")) in _RANKS})
    if not found:
        return ""
    return (
        f". forward() ranks what it has computed ({', '.join(found)}): of two that are nearly equal, rounding decides which "
        "is the first. To see whether it is only that, lower model.double() with backend='dense'"
    )


def _floats(values: Any) -> Iterator[Tensor]:
    return (each for each in pytree.tree_leaves(values) if isinstance(each, Tensor) and each.is_floating_point())


def _as(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _first(dense: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
