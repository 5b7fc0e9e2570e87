"""Layers of torch's own that Python calls between fragments.

    forward, left to Python    self.backbone(x) ──► nn.Sequential.forward, a frame that TorchDynamo skips as torch's own
    with a way in              self.backbone(x) ──► WayIn.__call__ ──TorchDynamo──► a fragment

TorchDynamo begins at frames of the user's and follows torch's code from there only. A forward that it leaves to Python, as
for a branch on data inside a loop, calls its own layers in frames that it takes, and `nn.Linear` in one that it does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_CALL = "_compiled_call_impl"  # what `nn.Module.compile` sets too; TorchDynamo, tracing a call, goes past it


class WayIn:
    """Calls a module from a frame that TorchDynamo takes. One code for all, so that equal layers share a fragment."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result."""
        return self.module._call_impl(*args, **kwargs)


@contextlib.contextmanager
def ways_in(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of torch's own below ``model`` that has weights has a way in, unless it is compiled already."""
    opened = [module for module in model.modules() if module is not model and _is_torchs(module) and _has_weights(module)]
    opened = [module for module in opened if getattr(module, _CALL) is None]
    for module in opened:
        module.__dict__[_CALL] = WayIn(module)
    try:
        yield
    finally:
        for module in opened:
            module.__dict__.pop(_CALL, None)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())
