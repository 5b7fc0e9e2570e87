"""What parts of a model are called with while somebody uses it: an example of a call, and the sizes that vary.

It is their ``forward`` that is watched, so a call of `part.forward(x)` counts, and what hooks make of arguments is there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.capture.routes import copies_of

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
"""Values that a graph takes as they are."""


@dataclass
class Calls:
    """The calls of one part. signature: of its forward; least: args and kwargs of the call with the fewest numbers, copied;
    count: how many there were; sizes: of each tensor in them, in the order of pytree, the shapes there were; several: why they
    are not of one kind; autocast: the dtype of `torch.autocast` around one of them.
    """

    signature: inspect.Signature
    least: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    count: int = 0
    sizes: list[set[tuple[int, ...]]] = field(default_factory=list)
    several: str = ""
    autocast: torch.dtype | None = None
    _first: tuple[tuple[Any, ...], tuple[str, ...]] | None = None
    _kind: Any = None
    _numbers: int = 0

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """One more call."""
        args, kwargs = self._as_first(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = spec, [_kind_of(leaf) for leaf in leaves]
        self.count += 1
        self.autocast = self.autocast or autocast_of(tensors)
        if self._kind is None:
            self._kind, self.sizes = kind, [set() for _ in tensors]
        elif kind != self._kind:
            self.several = self.several or _difference(self._kind, kind) or self._names(args, kwargs)
            return
        for known, tensor in zip(self.sizes, tensors, strict=True):
            known.add(tuple(tensor.shape))
        numbers = sum(tensor.numel() for tensor in tensors)
        if self.least is None or numbers < self._numbers:
            self.least, self._numbers = copies_of((args, dict(kwargs))), numbers

    def _as_first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments as the first call gave them, if it gave the same: ``f(x)`` and ``f(input=x)`` are one kind of call."""
        named = self._named(args, kwargs)
        if self._first is None:
            self._first = tuple(named or ())[: len(args)], tuple(kwargs)
        by_place, by_name = self._first
        if named is None or set(named) != {*by_place, *by_name}:
            return args, kwargs
        return tuple(named[name] for name in by_place), {name: named[name] for name in by_name}

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Each argument by its name, in the order of the signature; None where ``*args`` have none, or it does not fit."""
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
        except TypeError:
            return None
        named = dict[str, Any]()
        for name, value in bound.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                return None
            named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        return named

    def _names(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """How the arguments of a call differ from those of the first, if none differs by itself."""
        now, (by_place, by_name) = tuple(self._named(args, kwargs) or ()), self._first or ((), ())
        first = (*by_place, *by_name)
        if set(now) == set(first):
            return "arguments of another structure"
        return f"with {', '.join(first) or 'nothing'} and with {', '.join(now) or 'nothing'}"

    def varying(self) -> list[frozenset[int]]:
        """For each tensor the axes whose sizes differ from call to call."""
        return [
            frozenset(axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1)
            for shapes in self.sizes
        ]


@contextmanager
def watched(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, Calls]]:
    """Within, calls of the ``parts`` are written down, by name. What was compiled by itself runs eagerly."""
    calls = {name: Calls(inspect.signature(part.forward)) for name, part in parts.items()}
    before = {name: {key: value for key, value in part.__dict__.items() if key == "forward"} for name, part in parts.items()}
    for name, part in parts.items():
        part.__dict__["forward"] = _noted(part.forward, calls[name])
    try:
        with _eager():
            yield calls
    finally:
        for name, part in parts.items():
            del part.__dict__["forward"]
            part.__dict__.update(before[name])


def _noted(forward: Any, calls: Calls) -> Any:
    @functools.wraps(forward)
    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.add(args, kwargs)
        return forward(*args, **kwargs)

    return noted


def _eager() -> AbstractContextManager[Any]:
    """TorchDynamo has made its graphs, if it is there at all, and would not see that somebody watches."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def autocast_of(tensors: list[Tensor]) -> torch.dtype | None:
    """The dtype that `torch.autocast` has for tensors on the device of these; None if it is off."""
    kind = tensors[0].device.type if tensors else "cpu"
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def _kind_of(leaf: Any) -> Any:
    """What two calls must have in common to be one graph: of tensors the dtype and axes, of plain values all."""
    if isinstance(leaf, Tensor):
        return "tensor", leaf.dtype, leaf.ndim, leaf.device
    return ("value", type(leaf), leaf) if isinstance(leaf, PLAIN) else ("object", type(leaf), None)


def _difference(first: Any, other: Any) -> str:
    """The first argument that differs, if there are as many and of one structure."""
    if first[0] != other[0]:
        return ""
    for before, now in zip(first[1], other[1], strict=False):
        if before != now:
            return f"{_said(before)} and {_said(now)}"
    return ""


def _said(kind: Any) -> str:
    if kind[0] == "tensor":
        return f"a {str(kind[1]).removeprefix('torch.')} tensor of {kind[2]} axes"
    return f"{kind[2]!r}" if kind[0] == "value" else f"a {kind[1].__name__}"
