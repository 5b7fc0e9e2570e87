"""Gradients that forward() makes by hand: an exported graph holds none of them, and trains with others in silence.

    class Round(torch.autograd.Function)    straight through in backward(), while its round() alone has no gradient
    h.register_hook(lambda g: g / 2)        where h is a tensor of the model
    with autocast: with no_grad: ...        gradients would go on into what is frozen

Export traces through such a function, drops such a hook and forgets such a region. So the capture of a model that is to
train fails there, and it runs in TorchDynamo's fragments, which keep all three.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._export.passes import replace_set_grad_with_hop_pass as hop_pass
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.amp import autocast_mode as amp
from torch.fx import GraphModule

_SETTERS = ("register_hook", "register_post_accumulate_grad_hook")
_ASKED = "_is_setup_context_defined"  # what Function.apply calls first before torch 2.14, also where it goes by another name
_HOLDS_NONE = "in forward(): a graph of torch.export does not hold the backward() of a function"


class Lost(RuntimeError):
    """An exported graph cannot hold this."""


@contextlib.contextmanager
def nothing_lost() -> Iterator[None]:
    """Inside, a hook on a tensor that is traced, or an autograd function that gets one with a gradient, raises `Lost`.

    So does a graph with ``no_grad`` in a region of autocast.
    """
    with contextlib.ExitStack() as stack:
        name = "replace_set_grad_with_hop_pass"
        stack.enter_context(patch.object(hop_pass, name, _looking_for_nested(getattr(hop_pass, name))))
        for name in _SETTERS:
            stack.enter_context(patch.object(Tensor, name, _refusing(name, getattr(Tensor, name))))
        asked = getattr(torch.autograd.function, _ASKED, None)
        in_python = isinstance(vars(torch.autograd.Function).get("apply"), classmethod)
        if asked is not None and in_python:
            stack.enter_context(patch.object(torch.autograd.function, _ASKED, _looking(asked)))
        kinds: list[Any] = [] if in_python else list(_functions(torch.autograd.Function))
        for kind in kinds:  # what C++ calls is their forward
            stack.enter_context(patch.object(kind, "forward", staticmethod(_guarded(kind, kind.forward))))
        yield


def _looking_for_nested(function: Callable[..., Any]) -> Callable[..., Any]:
    def replaced(gm: GraphModule, *args: Any) -> Any:
        depth = 0
        for node in gm.graph.nodes:
            depth += (node.target is amp._enter_autocast) - (node.target is amp._exit_autocast)
            switches = node.target is torch._C._set_grad_enabled
            if depth and switches and node.args[0] is not torch.is_grad_enabled():
                raise Lost("torch.no_grad() within torch.autocast in forward(): a graph of torch.export forgets it")
        return function(gm, *args)

    return replaced


def _functions(base: type) -> Iterator[Any]:
    """All autograd functions there are but torch's own and ours."""
    kinds: list[Any] = base.__subclasses__()
    for kind in kinds:
        yield from _functions(kind)
        if not kind.__module__.startswith(("torch.", "nm_compiler.")):
            yield kind


def _guarded(kind: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        traced = any(isinstance(arg, (FakeTensor, FunctionalTensor)) and arg.requires_grad for arg in args)
        wanted = getattr(args[0], "needs_input_grad", (True,)) if args else ()  # a context, unless setup_context() gets it
        if traced and any(wanted):
            raise Lost(f"{kind.__qualname__} {_HOLDS_NONE}")
        return forward(*args)

    return run


def _refusing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any) -> Any:
        if isinstance(self, (FakeTensor, FunctionalTensor)):
            raise Lost(f"Tensor.{name} in forward(): a graph of torch.export holds no hooks")
        return function(self, *args)

    return method


def _looking(function: Callable[..., Any]) -> Callable[..., Any]:
    def asked(setup_context: Any) -> Any:
        caller = sys._getframe(1).f_locals  # round = Round.apply, bound long ago, would go past another apply
        kind, args = caller.get("cls"), caller.get("args", ())
        traced = any(isinstance(arg, (FakeTensor, FunctionalTensor)) and arg.requires_grad for arg in args)
        if traced and torch.is_grad_enabled() and isinstance(kind, type) and not kind.__module__.startswith("torch."):
            raise Lost(f"{kind.__qualname__} {_HOLDS_NONE}")
        return function(setup_context)

    return asked
