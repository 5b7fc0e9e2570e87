"""Layers of a captured model that Python calls by themselves: masks are in the captured graph, so they would run dense.

    sparse = nm.compile(model, (x,))
    sparse(x)          the graph: no layer is called; or fragments, and Python that calls layers, which is watched
    model(x)           its layers: an error where gradients would train dense weights, else a warning, once
    sparse.body(x)     the same

Hooks on the layers say so, until `nm.freeze` takes them off.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.fragments.watching import is_watched

_log = logging.getLogger(__name__)
_WAY_OUT = (
    "Call what nm.compile returned, not the model that it was given, or layers of it; nm.compile(model), without inputs, "
    "follows such calls, and layers of what nm.freeze returns are sparse by themselves"
)


@dataclass
class DenseCall:
    """A forward pre-hook on a layer that multiplies a planned weight: path of the layer, weight from there.

    parts: a mode runs in fragments, so TorchDynamo traces the layer, or Python calls it in between, under a `Watch`.
    told: shared by the layers of a model, for one warning.
    """

    path: str
    weight: str
    parts: bool
    told: list[str]

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Raises NMError where gradients are taken. A weight that was swapped, as functional_call does, is no dense one."""
        if self.parts and (torch.compiler.is_compiling() or is_watched()):
            return
        if not isinstance(_at(module, self.weight), nn.Parameter):
            return
        if torch.is_grad_enabled():
            raise NMError(f"{self._text(module)}. {_WAY_OUT}. To compare: under torch.no_grad()")
        if not self.told:
            self.told.append(self.path)
            _log.warning("%s; no gradient is taken, so it goes on. %s", self._text(module), _WAY_OUT)

    def _text(self, module: nn.Module) -> str:
        return (
            f"{self.path} ({type(module).__name__}) was called by Python and multiplies its dense weight: its mask is in the "
            "graph of forward() that nm.compile captured"
        )


def watch(model: nn.Module, names: Iterable[str], *, parts: bool) -> None:
    """Hook the layers that would multiply the weights ``names``; hooks that a copy or a file brought along are replaced.

    parts: the model runs in fragments in one of its modes.
    """
    unwatch(model)
    told = list[str]()
    for name in names:
        path, _, weight = name.rpartition(".")
        while path and type(model.get_submodule(path)).forward is nn.Module.forward:  # a list or a dict of weights
            path, _, above = path.rpartition(".")
            weight = f"{above}.{weight}"
        layer = model.get_submodule(path)
        layer.register_forward_pre_hook(DenseCall(path or "the model", weight, parts, told))


def unwatch(model: nn.Module) -> None:
    """Take the hooks off again."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, DenseCall)]:
            del hooks[key]


def _at(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path)._parameters.get(leaf)
