"""nm.lower_parts: parts of a model on a runtime, and the rest as it is, so that `generate` and whatever else it does stay.

    model --run(model)--> the calls of every part (`watching`) --nm.lower, one part after the other--> Lowered parts
          --`twin`--> a model of the same class, over the same memory, with these in their places

The model itself is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from nm_compiler.around_parts import around_parts
from nm_compiler.capture.example import example
from nm_compiler.capture.export import in_mode
from nm_compiler.capture.preparing import globs
from nm_compiler.capture.routes import undone
from nm_compiler.capture.turns import in_turn
from nm_compiler.capture.watching import watched
from nm_compiler.errors import NMError
from nm_compiler.hooks import apart, hooked_inside, own_hooks
from nm_compiler.lowering import check_frozen, lower_over
from nm_compiler.pattern import PatternLike, PatternMap, PatternSpec, matches
from nm_compiler.runtime.lowered import Lowered
from nm_compiler.runtime.verify import examine
from nm_compiler.sites.plan import check_globs
from nm_compiler.twin import twin
from nm_compiler.wording import several

M = TypeVar("M", bound=nn.Module)


@in_turn
def lower_parts(
    model: M,
    parts: str | Sequence[str],
    run: Callable[[M], Any],
    *,
    backend: str = "auto",
    pattern: PatternSpec = "2:4",
    exclude: Sequence[str] = (),
    force: Sequence[str] = (),
    check: bool = True,
    options: Mapping[str, Any] | None = None,
) -> M:
    """Lower parts of a frozen model, each by itself as `lower` does, for models that do more than one graph can: `generate`.

    model: what `freeze` returned, or any model whose weights are N:M. It stays as it is.
    parts: globs over names of modules, such as ``"*.mlp"`` or ``["*_proj"]``; of nested ones the outer is lowered, and one
    without a weight that is N:M is left alone.
    run: uses the model as you will, without gradients and in evaluation mode:
    ``lambda model: model.generate(**inputs, max_new_tokens=3)``. Sizes in which the calls of a part differ are free. Of a
    part that takes one tensor axis 0 is free as well, and without convolutions all axes but the last. Others are fixed.
    Speed is measured with the smallest call, where an axis of 1 that is free counts as 2.
    backend, pattern, exclude, force, check, options: as for `lower`, with globs over parameter names of the whole model.

    Returns a copy of the model in evaluation mode, of the same class, that shares with it the memory of parameters that are
    not packed; buffers are copied.
    Raises NMError, nothing changed, if ``parts`` name none that has an N:M weight, if ``run`` never calls one of them or calls
    it in several ways, and what `lower` says of one, by its name.
    """
    check_frozen(model)
    if backend == "onnx":
        raise NMError("backend='onnx' writes a file of a whole model: nm.lower(part, ..., backend='onnx') writes a part's")
    patterns, exclude, force = PatternMap.parse(pattern), globs(exclude), globs(force)
    check_globs(model, patterns, (), exclude, force)
    chosen = _chosen(model, globs(parts), patterns, exclude)
    hooks = {part: own_hooks(part) for part in chosen.values()}
    twin(model, {part: nn.Identity() for part in hooks}, hooks)  # whether it can be copied, before all the work
    with undone(model), in_mode(model, False), torch.no_grad(), watched(chosen) as calls:
        run(model)
        hooks = {part: own_hooks(part) for part in chosen.values()}  # with those that the model gave itself meanwhile
        inner = {name: hooked_inside(part) for name, part in chosen.items()}
    ready = {name: example(name, chosen[name], calls.pop(name)) for name in chosen}
    made: dict[nn.Module, nn.Module] = {}
    for name, part in chosen.items():
        rules, (args, kwargs, shapes) = _rules(name, part, patterns), ready.pop(name)
        try:
            with undone(part), apart(part):
                lowered = lower_over(
                    part, args, kwargs, backend=backend, pattern=rules, exclude=_inside(name, part, exclude),
                    force=_inside(name, part, force), check=check, dynamic_shapes=shapes, options=options,
                )  # fmt: skip
        except NMError as error:
            raise NMError(f"{name}: {error}") from error
        lowered.__dict__.update(part=name, hooked=tuple(f"{name}.{path}" for path in inner[name]))
        made[part] = lowered
    return around_parts(twin(model, made, hooks)).eval()


def _chosen(model: nn.Module, wanted: Sequence[str], patterns: PatternMap, exclude: Sequence[str]) -> dict[str, nn.Module]:
    """The outermost modules that the globs name, if they have an N:M weight, by name. Raises NMError if none has."""
    found: dict[str, nn.Module] = {}
    inner = {name: module for name, module in model.named_modules() if name}
    for glob in wanted:
        if not any(matches(name, (glob,)) for name in inner):
            raise NMError(
                f"parts={glob!r} matches no module of this {type(model).__name__}; there are {several(list(inner), 6)}"
            )
    for name, module in inner.items():
        if matches(name, wanted) and not any(name.startswith(f"{outer}.") for outer in found):
            if any(isinstance(each, Lowered) for each in module.modules()):
                raise NMError(f"{name} is lowered already: name others in parts=, or lower the model that it was made of")
            found[name] = module
    sparse = {name: module for name, module in found.items() if _has_sparse(name, module, patterns, exclude)}
    if not sparse:
        raise NMError(
            f"none of the {len(found)} parts ({several(list(found), 3)}) has a weight that is {patterns}: nothing to lower. "
            "Train the model with nm.compile and nm.freeze it, or say pattern="
        )
    return sparse


def _has_sparse(name: str, part: nn.Module, patterns: PatternMap, exclude: Sequence[str]) -> bool:
    weights = {f"{name}.{inner}": weight for inner, weight in part.named_parameters()}
    wanted = {full: weight.detach() for full, weight in weights.items() if matches(full, exclude) is None}
    return any(weight.axes for weight in examine(wanted, dict(patterns.rules)).weights) if wanted else False


def _rules(name: str, part: nn.Module, patterns: PatternMap) -> dict[str, PatternLike]:
    """The pattern of each weight of a part, by its name in there."""
    own = {inner: patterns.of(f"{name}.{inner}") for inner, weight in part.named_parameters() if weight.ndim > 1}
    return {inner: pattern for inner, pattern in own.items() if pattern is not None}


def _inside(name: str, part: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Which weights of a part globs over the whole model name, by their names in there."""
    return [inner for inner, weight in part.named_parameters() if weight.ndim > 1 and matches(f"{name}.{inner}", wanted)]
