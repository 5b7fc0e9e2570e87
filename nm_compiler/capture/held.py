"""Numbers that ``forward`` reads from its layers, and tensors and functions: a graph holds those of its capture for good.

    def forward(self, x): return self.fc(x) / self.temperature        graph: div(linear, 0.5)

So a temperature that a loop anneals, a dropout's ``p`` or a switch that is set later would be ignored without a word, and so
would a tensor that is no buffer and is replaced, as weights of classes are. Which names ``forward`` reads is told from its
code, and that of the methods it calls; what it or ``train`` sets is left out.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str)
_SHOWN = (*_PLAIN, type(None))
_HELD = (*_SHOWN, Tensor, FunctionType, BuiltinFunctionType)
_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


@dataclass(frozen=True, slots=True)
class Held:
    """The attribute ``name`` of a layer, whose own these are; value: at capture; where: its whole name."""

    attributes: dict[str, Any]
    name: str
    value: Any
    where: str

    @property
    def trains_only(self) -> bool:
        """Whether evaluation does not ask for it: dropouts, and momenta of batch norms."""
        return self.name in ("p", "momentum") or "drop" in self.name

    def is_another(self) -> bool:
        """Whether it has another value now. A tensor that was moved to another device, as the graph is, is the same."""
        now = self.attributes.get(self.name)
        if now is self.value:
            return self._is_registered()
        if isinstance(now, Tensor) and isinstance(self.value, Tensor):
            moved = now.device != self.value.device and not now.is_meta and not self.value.is_meta
            return not (moved and now.dtype == self.value.dtype and torch.equal(now, self.value.to(now.device)))
        return not isinstance(now, _PLAIN) or not isinstance(self.value, _PLAIN) or now != self.value

    def _is_registered(self) -> bool:
        """Whether what was a plain attribute, as None, is a parameter, a buffer or a layer now."""
        kinds = ("_parameters", "_buffers", "_modules")
        return self.name not in self.attributes and any(self.attributes[kind].get(self.name) is not None for kind in kinds)

    def told(self) -> str:
        """Which value it has now and which the graph holds."""
        now = self.attributes.get(self.name)
        if self._is_registered():
            return f"{self.where} is a parameter, a buffer or a layer now, and the captured graph holds {self.value}"
        if isinstance(now, _SHOWN) and isinstance(self.value, _SHOWN):
            return f"{self.where} is {now} now, and the captured graph holds {self.value}"
        kind = "tensor" if isinstance(now, Tensor) and isinstance(self.value, Tensor) else "object"
        return f"{self.where} is another {kind} now, and the captured graph holds the one of before"


def held(root: nn.Module) -> Iterator[Held]:
    """The attributes of the layers of ``root`` that its graphs may hold."""
    kinds = {type(module) for module in root.modules()}
    read = {name for kind in kinds for name in _names(kind, "forward")[0]}
    read -= {name for kind in kinds for start in ("forward", "train") for name in _names(kind, start)[1]}
    for path, module in root.named_modules():
        for name, value in module.__dict__.items():
            if (
                (isinstance(value, _HELD) or value is None)
                and name in read
                and name != "training"
                and not name.startswith("_")
            ):
                yield Held(module.__dict__, name, value, f"{path}.{name}".lstrip("."))


def names_read(kind: type) -> frozenset[str]:
    """The attributes that ``forward`` of a class reads, by name."""
    return _names(kind, "forward")[0]


def _names(kind: type, start: str) -> tuple[frozenset[str], frozenset[str]]:
    """The attributes that the method ``start`` of a class, and those that it calls, read and set, by name."""
    read, written = set[str](), set[str]()
    for code in codes_of(kind, start):
        for step in dis.get_instructions(code):
            if step.opname in _READS:
                read.add(step.argval)
            elif step.opname == "STORE_ATTR":
                written.add(step.argval)
    return frozenset(read), frozenset(written)


def codes_of(kind: type, start: str) -> Iterator[CodeType]:
    """The code of the method ``start`` of a class, and of the methods of it that it calls."""
    seen, left = set[str](), [start]
    while left:
        seen.add(method := left.pop())
        for code in _codes(kind, method):
            yield code
            read = {step.argval for step in dis.get_instructions(code) if step.opname in _READS}
            left += [name for name in read - seen if name not in left and any(_codes(kind, name))]


def _codes(kind: type, method: str) -> Iterator[CodeType]:
    """The code of a method, of all classes that have it (which `super` may call), without decorators; and code in it."""
    for each in kind.__mro__:
        found = vars(each).get(method) if each not in nn.Module.__mro__ else None
        found = getattr(found, "fget", None) or getattr(found, "__func__", None) or found  # a property, a static method
        function = inspect.unwrap(found) if callable(found) else None
        left = [function.__code__] if isinstance(function, FunctionType) else []
        while left:
            yield (code := left.pop())
            left += [value for value in code.co_consts if isinstance(value, CodeType)]
