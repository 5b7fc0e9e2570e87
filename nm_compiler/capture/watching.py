"""What parts of a model are called with while somebody uses it: an example of a call, and the sizes that vary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """The calls of one part. least: args and kwargs of the one with the fewest numbers, copied; count: how many there were;
    sizes: of each tensor in them, in the order of pytree, the shapes there were; several: why they are not of one kind.
    """

    least: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    count: int = 0
    sizes: list[set[tuple[int, ...]]] = field(default_factory=list)
    several: str = ""
    _kind: Any = None
    _numbers: int = 0

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """One more call."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = spec, [_kind_of(leaf) for leaf in leaves]
        self.count += 1
        if self._kind is None:
            self._kind, self.sizes = kind, [set() for _ in tensors]
        elif kind != self._kind:
            self.several = self.several or _difference(self._kind, kind)
            return
        for known, tensor in zip(self.sizes, tensors, strict=True):
            known.add(tuple(tensor.shape))
        numbers = sum(tensor.numel() for tensor in tensors)
        if self.least is None or numbers < self._numbers:
            self.least, self._numbers = copies_of((args, dict(kwargs))), numbers

    def varying(self) -> list[frozenset[int]]:
        """For each tensor the axes whose sizes differ from call to call."""
        return [
            frozenset(axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1)
            for shapes in self.sizes
        ]


@contextmanager
def watched(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, Calls]]:
    """Within, calls of the ``parts`` are written down, by name."""
    calls = {name: Calls() for name in parts}

    def note(name: str) -> Any:
        return lambda module, args, kwargs: calls[name].add(args, kwargs)

    handles = [part.register_forward_pre_hook(note(name), with_kwargs=True, prepend=True) for name, part in parts.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _kind_of(leaf: Any) -> Any:
    """What two calls must have in common to be one graph: of tensors the dtype and axes, of plain values all."""
    if isinstance(leaf, Tensor):
        return "tensor", leaf.dtype, leaf.ndim, leaf.device
    return ("value", type(leaf), leaf) if isinstance(leaf, PLAIN) else ("object", type(leaf), None)


def _difference(first: Any, other: Any) -> str:
    for before, now in zip(first[1], other[1], strict=False):
        if before != now:
            return f"{_said(before)} and {_said(now)}"
    return "other arguments each time"


def _said(kind: Any) -> str:
    if kind[0] == "tensor":
        return f"a {str(kind[1]).removeprefix('torch.')} tensor of {kind[2]} axes"
    return f"{kind[2]!r}" if kind[0] == "value" else f"a {kind[1].__name__}"
