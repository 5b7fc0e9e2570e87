"""What modules around lowered parts do otherwise than their class: `to` for all of it or nothing, no `save_pretrained`.

They keep their class, so it is on the modules themselves, as `functools.partial`, which copies and pickles with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.runtime.lowered import Lowered

M = TypeVar("M", bound=nn.Module)
_WRITES = ("save_pretrained", "push_to_hub")


def around_parts(model: M) -> M:
    """See to all modules of ``model`` that have lowered parts in them. Returns it."""
    for module in model.modules():
        if isinstance(module, Lowered) or not any(isinstance(inner, Lowered) for inner in module.modules()):
            continue
        module.__dict__["_apply"] = partial(_apply, module)
        for name in _WRITES:
            if hasattr(type(module), name):
                module.__dict__[name] = partial(_refuse, name)
    return model


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
    """As of its class, but that a part that cannot follow says so before anything has changed."""
    for inner in module.modules():
        if isinstance(inner, Lowered):
            inner.check_apply(fn)
    return type(module)._apply(module, fn, *args, **kwargs)


def _refuse(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise NMError(
        f"{name}() of a model with lowered parts would write packed weights that from_pretrained() takes for missing ones: "
        "save the model that was given to nm.lower_parts, or all of this one with torch.save(model, path)"
    )
