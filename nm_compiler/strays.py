"""What in a copy of a model would still run modules of the model: Python copies no functions.

module.forward = lambda x: layer(x)                    # the copy has the same function, which calls the same layer
module.forward = functools.partial(function, module)   # copied with the module
module.forward = types.MethodType(function, module)    # too
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nm_compiler.hooks import CALLED

_HELD = ("_parameters", "_buffers", "_modules")
_NOTHING = (str, bytes, int, float, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType, Tensor)


def stray(made: nn.Module, model: nn.Module, instead: Collection[nn.Module]) -> str | None:
    """What to say of the first attribute in a copy that leads to a module of the model; None if there is none.

    instead: modules of the copy that are none of the model's: only their hooks are looked into.
    """
    theirs = {id(module): f"{name} of the model" if name else "the model" for name, module in model.named_modules()}
    inside = {id(inner) for each in instead for inner in each.modules()}
    known = inside | {id(module) for module in made.modules()} - theirs.keys()
    for path, module in made.named_modules():
        if id(module) in theirs:
            return _said(path or "forward", theirs[id(module)], "it is not copied with the model")
        for key, value in module.__dict__.items():
            looked_at = key in CALLED if id(module) in inside else key not in _HELD
            found = _leads_to(value, theirs, known) if looked_at else None
            if found is not None:
                return _said(f"{path}.{key}" if path else key, found, "Python copies no functions, nor what they close over")
    return None


def _said(where: str, name: str, why: str) -> str:
    return (
        f"{where} in the copy that nm.lower_parts returns would run {name} that was given to it, with dense weights: {why}. "
        "Set it on what nm.lower_parts returns, or hand it the module as an argument: functools.partial(function, module)"
    )


def _leads_to(value: Any, theirs: Mapping[int, str], known: Collection[int]) -> str | None:
    """The name of a module of the model that a value holds, however deep."""
    waiting, seen, kept = [value], set(known), []
    while waiting:
        each = waiting.pop()
        if id(each) in theirs:
            return theirs[id(each)]
        if id(each) not in seen and not isinstance(each, _NOTHING):
            seen.add(id(each))
            kept.append(each)  # else another object could get its id
            waiting.extend(_held(each))
    return None


def _held(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, weakref.ref):
        return (value(),)
    own: Mapping[str, Any] = {}
    with contextlib.suppress(Exception):  # what stands for something else may answer anything
        own = vars(value)
    return [*_of_callable(value), *own.values()]


def _of_callable(value: Any) -> Iterable[Any]:
    if isinstance(value, types.FunctionType):
        return [*_closed_over(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return ()


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing in it yet
            yield cell.cell_contents
