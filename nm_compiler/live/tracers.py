"""Tracers that would take the dense weights of a live model are refused: TorchDynamo, which masks, does nothing under them.

torch.export, torch.jit.trace, make_fx      call the model: its carrier refuses
torch.fx.symbolic_trace                     calls forward() itself, past everything; before that it asks the root its name
torch.jit.script                            reads forward(); before that it asks the module for what is to be scripted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import _symbolic_trace as fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from nm_compiler.errors import NMError

_NAME, _SCRIPT = "_get_name", "__prepare_scriptable__"  # what torch.fx asks of a root, and torch.jit.script of every module


def refuse_tracers(model: nn.Module) -> None:
    """Raise NMError inside a tracer that would take the dense weights."""
    tracers = {
        "torch.export": torch.compiler.is_exporting(),
        "torch.jit.trace": torch._C._get_tracing_state() is not None,
        "make_fx": get_proxy_mode() is not None,
        "torch.fx": fx._is_fx_tracing_flag,
    }
    tracer = next((name for name, is_on in tracers.items() if is_on), None)
    if tracer is not None:
        raise _refusal(type(model), tracer)


@dataclass(frozen=True)
class Name:
    """The name of a live model's class, for all but torch.fx."""

    kind: type

    def __call__(self) -> str:
        """Raises NMError inside torch.fx."""
        if fx._is_fx_tracing_flag and get_proxy_mode() is None:  # make_fx has a root of its own
            raise _refusal(self.kind, "torch.fx")
        return self.kind.__name__


@dataclass(frozen=True)
class Unscriptable:
    """What torch.jit.script gets of a module."""

    kind: type

    def __call__(self) -> NoReturn:
        """Raises NMError."""
        raise _refusal(self.kind, "torch.jit.script")


def install_refusals(module: nn.Module, *, root: bool) -> None:
    """A live model, the ``root``, or a module in it, refuses what would not come by its call."""
    module.__dict__[_SCRIPT] = Unscriptable(type(module))
    if root:
        module.__dict__[_NAME] = Name(type(module))


def remove_refusals(module: nn.Module) -> None:
    """As it was."""
    own: dict[str, Any] = module.__dict__
    for key, kind in ((_SCRIPT, Unscriptable), (_NAME, Name)):
        if isinstance(own.get(key), kind):
            del own[key]


def _refusal(kind: type, tracer: str) -> NMError:
    return NMError(
        f"this {kind.__name__} was prepared by nm.compile without example inputs, and its masks are in the graphs "
        f"that TorchDynamo gives: {tracer} would take its weights dense. Trace what nm.freeze(model) returns, or what "
        "nm.compile(model, example_inputs) does: a graph, which can be traced while it trains"
    )
