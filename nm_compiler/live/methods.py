"""Methods beside ``forward`` that multiply a planned parameter of their module by hand: calls of them reach the carrier too.

    model.encode_text(x), from outside ──► MethodEntry ──► carrier.call ──TorchDynamo──► the method ──► fragments

A layer that such a method calls has an entry of its own (`nm_compiler.live.entries`), but ``x @ self.projection`` has none
and would run dense. Told from the method's code: it names the parameter, and multiplies. Without a tensor among its
arguments, as where parameters are initialised, a method runs as it is.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.links import owner_at

if TYPE_CHECKING:
    from nm_compiler.live.prepared import Prepared


class MethodEntry:
    """Runs a method of a module through its carrier, or, inside the carrier, as it is. It looks like a part of the model."""

    def __init__(self, module: nn.Module, name: str, carrier: Prepared, weights: tuple[str, ...]) -> None:
        self.module, self.name, self.carrier, self.weights = module, name, carrier, weights
        module.__dict__[name] = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method, for `inspect.signature`."""
        return MethodType(getattr(type(self.module), self.name), self.module)

    @property
    def training(self) -> bool:
        """The mode of the module."""
        return self.module.training

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """What TorchDynamo traces."""
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        carrier = self.carrier
        if carrier.is_inside():
            return self._call_impl(*args, **kwargs)
        open_ones = [name for name in self.weights if name in carrier.sites or name in carrier.candidates]
        if not open_ones or not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._call_impl(*args, **kwargs)
        return carrier.call(self, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodEntry:
        carrier = copy.deepcopy(self.carrier, memo)
        return MethodEntry(copy.deepcopy(self.module, memo), self.name, carrier, self.weights)

    def __reduce__(self) -> tuple[Any, ...]:
        return MethodEntry, (self.module, self.name, self.carrier, self.weights)


def install_methods(carrier: Prepared, names: Iterable[str]) -> None:
    """Give every method that multiplies one of the weights ``names`` by hand an entry."""
    owned: dict[str, list[str]] = {}
    for name in names:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    for path, weights in owned.items():
        module = owner_at(carrier.origin, path)
        for method, function in _own_methods(module):
            read = tuple(name for name in weights if name.rpartition(".")[2] in function.__code__.co_names)
            if read and method not in module.__dict__ and _multiplies(function):
                MethodEntry(module, method, carrier, read)


def remove_methods(module: nn.Module) -> None:
    """Take the entries off the methods of a module again."""
    for name in [name for name, value in module.__dict__.items() if isinstance(value, MethodEntry)]:
        del module.__dict__[name]


def _own_methods(module: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """Methods of the user's own classes but ``forward``, without their decorators."""
    classes = [each for each in type(module).__mro__ if not each.__module__.startswith("torch.") and each is not object]
    for name in dict.fromkeys(name for each in classes for name in vars(each)):
        found = inspect.getattr_static(type(module), name)
        function = inspect.unwrap(found) if inspect.isfunction(found) else None
        if isinstance(function, FunctionType) and name != "forward" and not name.startswith("__"):
            yield name, function


def _multiplies(function: FunctionType) -> bool:
    from nm_compiler.fragments.watching import PRODUCTS

    written = any(each.argrepr in ("@", "@=") for each in dis.get_instructions(function))
    return written or not set(PRODUCTS).isdisjoint(function.__code__.co_names)
