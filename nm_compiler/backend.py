"""The TorchDynamo backend: ``torch.compile(model, backend="nm_compiler")``, found by entry point without an import.

A bare `torch.compile` cannot make state for an optimizer, so it takes the methods that need none: Bi-Mask (the default)
with output channels in the order in which they lie, and SR-STE. All others are prepared by `nm.compile(model)`, which
also watches what runs outside fragments.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from nm_compiler.capture.preparing import check_model, globs
from nm_compiler.carrier import CARRIER, carrier_of
from nm_compiler.errors import NMError
from nm_compiler.live.entries import Entry
from nm_compiler.methods.base import Method, spelled
from nm_compiler.methods.bimask import BiMask
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.recipe import pipeline
from nm_compiler.state.beside import Weight

_log = logging.getLogger(__name__)
THEN = ("inductor", "aot_eager", "eager")
_NEAR = 24  # frames between a call of a model and the torch.compile around it, at most


@dataclass(frozen=True, slots=True)
class Options:
    """``torch.compile(..., options={...})``, checked. None is what was not said."""

    pattern: PatternMap | None = None
    method: Method | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    then: str | None = None


def options_of(given: Mapping[str, Any] | None) -> Options:
    """Read the options. Raises NMError for an unknown one, naming those there are."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in given or {}:
        if name not in known:
            raise NMError(f"options={{{name!r}: ...}}: backend 'nm_compiler' knows {', '.join(known)}")
    values = dict(given or {})
    if "pattern" in values:
        pattern: PatternSpec = values["pattern"]
        values["pattern"] = PatternMap.parse(pattern)
    if "method" in values:
        values["method"] = method_of(values["method"])
    for name in ("include", "exclude"):
        if name in values:
            values[name] = globs(values[name])
    if "then" in values:
        check_then(values["then"])
    return Options(**values)


def method_of(given: Any) -> Method:
    """A method, or its name as in ``options={"method": "BiMask"}``. Raises NMError."""
    if isinstance(given, str):
        import nm_compiler as nm

        named = {
            kind.__name__.lower(): kind for kind in vars(nm).values() if isinstance(kind, type) and issubclass(kind, Method)
        }
        kind = named.get(given.lower().replace("-", "").replace("_", ""))
        if kind is None or kind is Method:
            names = ", ".join(sorted(kind.__name__ for kind in named.values() if kind is not Method))
            raise NMError(f"method={given!r}: choose one of {names}")
        given = kind()
    pipeline(given, ())
    method: Method = given
    return method


def check_then(then: Any) -> None:
    """Raise NMError unless ``then`` is what can run the rewritten graph."""
    if then not in THEN:
        raise NMError(f"then={then!r}: what runs the rewritten graph is one of {', '.join(map(repr, THEN))}")


def nm_compiler(
    gm: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend. options: ``pattern``, ``method``, ``include``, ``exclude`` as for `nm.compile`; ``then``: what runs the
    rewritten graph, ``"inductor"`` (the default), ``"aot_eager"`` or ``"eager"``.

    Raises NMError for unknown options, for a method that needs state, and where a prepared model says otherwise.
    """
    strict()
    wanted = options_of(options)
    if mode is not None:
        raise NMError(f"mode={mode!r}: backend 'nm_compiler' has no modes; options={{'then': 'inductor'}} says what runs it")
    root = root_on_stack()
    from nm_compiler.live.live import refuse_rewritten

    if root is None:
        if any(isinstance(value, nn.Parameter) and value.ndim >= 2 for value in inputs):
            raise NMError(
                "backend 'nm_compiler' compiles modules, and this is a function that uses one: torch.compile(model, "
                "backend='nm_compiler'), or model = nm.compile(model) before the function is compiled by any backend"
            )
        from torch._dynamo.backends.registry import lookup_backend

        plain: Any = lookup_backend(wanted.then or "inductor")
        untouched: Callable[..., Any] = plain(gm, inputs)
        return untouched
    refuse_rewritten(gm, root)
    reason, known = getattr(gm, "compile_subgraph_reason", None), carrier_of(root)
    looked = known is not None and known.looked
    whole = not (reason is None or reason.graph_break) and not looked
    if not whole and not looked:
        _log.warning(
            "%s comes in several fragments (%s): what Python does between them is not seen, and may read weights densely; "
            "nm.compile(model) watches it",
            type(root).__name__, getattr(reason, "reason", "a frame was skipped"),
        )  # fmt: skip
    prepared = prepared_by_name(root, wanted)
    made: Callable[..., Any] = prepared.live.compile(gm, inputs, whole=whole)
    if not prepared.bare:
        return made
    from nm_compiler.live.by_name import ByName

    return ByName(made, wanted)  # type: ignore[arg-type]


def prepared_by_name(root: nn.Module, wanted: Options) -> Any:
    """The carrier of a model whose fragment comes. Raises NMError if it was prepared with other options."""
    prepared = carrier_of(root)
    if prepared is None:
        prepared = bare(root, wanted)
    else:
        check_same(prepared, wanted)
    prepared.looked = True
    return prepared


def strict() -> None:
    """Switch off, for good, TorchDynamo's two ways of going on with dense code. Raises NMError if one was asked for."""
    config = torch._dynamo.config
    suppressed, config.suppress_errors = config.suppress_errors, False
    config.fail_on_recompile_limit_hit = True
    if suppressed:
        raise NMError(
            "torch._dynamo.config.suppress_errors was on, with which a model that cannot be rewritten runs dense in silence: "
            "it is off now, call the model again"
        )


def bare(root: nn.Module, wanted: Options) -> Any:
    """Prepare a model that `nm_compiler.compile` has not prepared. Raises NMError if the method keeps state beside weights."""
    from nm_compiler.live.prepared import Prepared

    method = wanted.method if wanted.method is not None else BiMask()
    if type(method) is BiMask:
        method = dataclasses.replace(method, fold=True)  # no order to keep: rows as they lie
    check_model(root, "torch.compile")
    patterns = wanted.pattern or PatternMap.parse("2:4")
    made = Prepared(
        root, method, patterns, include=wanted.include or (), exclude=wanted.exclude or (), then=wanted.then or "inductor"
    )
    for site in made.candidates.values():
        if method.suffixes(site) or method.state(site, Weight(site, root).param.detach()):
            raise NMError(
                f"{method.name} keeps state beside every weight ({', '.join(method.suffixes(site))}), which has to be there "
                "before the optimizer is built: instead of torch.compile, "
                f"model = nm.compile(model, method={spelled(type(method))}())"
            )
    made.bare = True
    root.__dict__[CARRIER] = made
    return made


def check_same(prepared: Any, wanted: Options) -> None:
    """Raise NMError where options differ from what the model was prepared with."""
    method = wanted.method
    if method is not None and prepared.bare and type(method) is BiMask:
        method = dataclasses.replace(method, fold=True)
    said = {
        "method": (method, prepared.method),
        "pattern": (wanted.pattern, prepared.patterns),
        "then": (wanted.then, prepared.then),
        "include": (wanted.include, prepared.include),
        "exclude": (wanted.exclude, prepared.exclude),
    }
    for name, (new, old) in said.items():
        if new is not None and new != old:
            raise NMError(
                f"options say {name}={new}, but this {type(prepared.origin).__name__} was prepared with {old}: "
                "leave the option out, or nm.freeze the model first"
            )


def outer_options(root: nn.Module) -> Options | None:
    """What ``torch.compile(root, backend="nm_compiler", options=...)`` said, if the running call came through it."""
    frame = sys._getframe(1)
    for _ in range(_NEAR):
        own = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None
        if isinstance(own, torch._dynamo.eval_frame.OptimizedModule) and own._orig_mod is root:
            wrapper: Any = own.dynamo_ctx.callback
            while (inner := getattr(wrapper, "_torchdynamo_orig_backend", None)) is not None:
                wrapper = inner
            ours = getattr(wrapper, "compiler_fn", None) is nm_compiler
            return options_of(wrapper.kwargs.get("options")) if ours else None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def root_on_stack() -> nn.Module | None:
    """The outermost compiled module that is being called, which a backend is not told."""
    found: nn.Module | None = None
    frame = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None
        if isinstance(own, torch._dynamo.eval_frame.OptimizedModule):
            found = own._orig_mod
        elif isinstance(own, nn.Module) and own._compiled_call_impl is not None:
            found = own
        elif isinstance(own, Entry):
            found = own.module
        frame = frame.f_back  # type: ignore[assignment]
    return found
