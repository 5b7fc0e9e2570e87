"""Forward hooks of a part that is lowered: its own are kept around it, those inside of it are in its graph.

hooks of the part            called around the lowered part, as around the part: `apart` when it is captured
hooks of modules inside it   run once, at capture: what they compute is in the graph, and the report has a note
those of torch.nn.utils      compute weights (weight norm of old), and belong to the graph wherever they are
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Hooks = Mapping[str, Mapping[int, Any]]
"""By the attributes of a module that hold them."""
CALLED = ("_forward_pre_hooks", "_forward_hooks")
OWN = (*CALLED, "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def own_hooks(part: nn.Module) -> Hooks:
    """The hooks to call around a lowered part, by the attributes of a module that hold them."""
    known = {key for name in CALLED for key, hook in getattr(part, name).items() if not _weighs(hook)}
    return {name: {key: hook for key, hook in getattr(part, name).items() if key in known} for name in OWN}


@contextmanager
def apart(part: nn.Module) -> Iterator[None]:
    """Within, the part is without its own hooks."""
    kept, taken = {name: dict(getattr(part, name)) for name in OWN}, own_hooks(part)
    try:
        for name, hooks in taken.items():
            for key in hooks:
                del getattr(part, name)[key]
        yield
    finally:
        for name, hooks in kept.items():
            getattr(part, name).clear()
            getattr(part, name).update(hooks)


def hooked_inside(part: nn.Module) -> list[str]:
    """The modules inside of a part that have hooks of somebody's, by name."""
    return [path for path, module in part.named_modules() if path and any(own_hooks(module).values())]


def _weighs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")
