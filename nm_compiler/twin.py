"""A copy of a model that shares the memory of its parameters, with other modules in the place of some.

parameters   objects of their own over the same memory, so that `to` and `half` change those of the copy alone
buffers      copied: a model writes to them while it is used
hooks        of modules that others stand for: on those
all else     as copy.deepcopy has it; what that leaves behind is an NMError (`strays`)
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.hooks import Hooks
from nm_compiler.memory import memory_of
from nm_compiler.runtime.lowered import Lowered
from nm_compiler.strays import stray
from nm_compiler.wording import first_line

M = TypeVar("M", bound=nn.Module)
_HELD = ("_parameters", "_buffers", "_modules")


def twin(model: M, instead: Mapping[nn.Module, nn.Module], hooks: Mapping[nn.Module, Hooks]) -> M:
    """The copy. instead: what stands there for modules of the model; hooks: those of these modules.

    Raises NMError for what cannot be copied, and for what would still call modules of the model after that.
    """
    memo: dict[int, Any] = {id(parameter): _own(parameter) for parameter in model.parameters()}
    for each in model.modules():
        if isinstance(each, Lowered):
            memo.update((id(values), values.detach()) for values in each.packed())
        computed = (value for value in each.__dict__.values() if isinstance(value, Tensor) and value.grad_fn is not None)
        memo.update((id(value), value.detach().clone()) for value in computed)  # weight norm's of old, kept activations
    memo.update((id(module), other) for module, other in instead.items())
    try:
        for other in instead.values():
            _share_no_buffers(other, model, memo)
        made = copy.deepcopy(model, memo)
        for module, other in instead.items():
            for name, own in hooks[module].items():
                getattr(other, name).update(copy.deepcopy(own, memo))
    except NMError:
        raise
    except Exception as error:
        raise NMError(_uncopied(model, error)) from error
    _follow(made, memo)
    found = stray(made, model, instead.values())
    if found is not None:
        raise NMError(found)
    return made


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter again: another object of its class, over the same memory."""
    kind: Any = type(parameter)
    with torch.inference_mode(parameter.is_inference()):
        values, grad = parameter.detach(), parameter.requires_grad
        plain = kind is nn.Parameter or not issubclass(kind, nn.Parameter)
        made: nn.Parameter = nn.Parameter(values, grad) if plain else Tensor._make_subclass(kind, values, grad)
    made.__dict__.update(parameter.__dict__)
    return made


def _share_no_buffers(other: nn.Module, model: nn.Module, memo: dict[int, Any]) -> None:
    """Give a module that was made of one of the model's the buffers of the copy."""
    theirs = {memory_of(buffer) for buffer in model.buffers()} - {None}
    for module in other.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and memory_of(buffer) in theirs:
                module._buffers[name] = copy.deepcopy(buffer, memo)


def _follow(made: nn.Module, memo: Mapping[int, Any]) -> None:
    """Weak references, which are never copied, to the copies of what they referred to."""
    for module in made.modules():
        for key, value in module.__dict__.items():
            if type(value) is weakref.ref and id(value()) in memo:
                module.__dict__[key] = weakref.ref(memo[id(value())])


def _uncopied(model: nn.Module, error: Exception) -> str:
    """Which attribute it is that copy.deepcopy fails at."""
    known = {id(each): each for each in (*model.modules(), *model.parameters())}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in _HELD:
                continue
            try:
                copy.deepcopy(value, dict(known))
            except Exception as own:
                name = f"{path}.{key}" if path else key
                return (
                    f"{name} of this {type(model).__name__} is a {type(value).__name__} that cannot be copied "
                    f"({first_line(own)}), and lowered parts come in a copy of the model: take it off (del, None) before "
                    "nm.lower_parts and put it on what that returns, or give its class a __deepcopy__"
                )
    return (
        f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}), and lowered parts come "
        "in a copy of the model: see that copy.deepcopy(model) works"
    )
