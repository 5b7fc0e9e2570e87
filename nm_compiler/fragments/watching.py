"""What Python does between the fragments of a model: a weight that it multiplies there would be dense, and nobody would know.

While a model runs in fragments, every torch function that Python calls outside them is looked at. A parameter that a tensor is
computed from is told to the carrier, which knows whether it matters.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from nm_compiler.capture.explaining import user_line
from nm_compiler.fragments.arrays import OPERATORS, TURNED

PRODUCTS = (
    "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "bilinear",
    "conv1d", "conv2d", "conv3d", "multi_head_attention_forward", "t", "transpose", "permute",
)  # fmt: skip
"""Functions that multiply with a weight, or show it transposed to one that does, by name."""

_CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone")


class Watcher(Protocol):
    """Who is told."""

    def name_of(self, parameter: Tensor) -> str | None:
        """The full name of a parameter of the model, or None."""

    runs: list[Any] | None

    def note_outside(self, name: str, func: Any) -> None:
        """A parameter was read outside fragments, by ``func``."""


class Watch(TorchFunctionMode):
    """Sees every torch function that Python calls outside fragments. Inside them Dynamo traces it away."""

    def __init__(self, carrier: Watcher) -> None:
        super().__init__()
        self.carrier = carrier
        self._computed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # views and casts of parameters, and their names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            if args and isinstance(args[0], np.ndarray) and func.__name__ in OPERATORS:
                return OPERATORS[func.__name__](*args)
            if args and isinstance(args[0], np.ndarray) and func.__name__ in TURNED:
                return TURNED[func.__name__](args[1], args[0])
            if func is Tensor.unflatten:  # it is written in Python: Dynamo cannot go into it, but knows the method
                return getattr(args[0], func.__name__)(*args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.look(func, args, kwargs, result)
        return result

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def look(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note a parameter that a tensor was computed from."""
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        if not tensors or not isinstance(result, (Tensor, tuple, list)) or torch._guards.CompileContext.try_get() is not None:
            return
        for tensor in tensors:
            name = self.carrier.name_of(tensor) if isinstance(tensor, nn.Parameter) else None
            if name is not None:
                self.carrier.note_outside(name, func)
            if self.carrier.runs is not None:
                self._follow(name, tensor, func, result)

    def _follow(self, name: str | None, tensor: Tensor, func: Any, result: Any) -> None:
        """While a run is planned on, a product with a view or a cast of a parameter is a product with the parameter."""
        known = name or self._computed.get(tensor)
        if known is None:
            return
        if name is None and getattr(func, "__name__", "") in (*PRODUCTS, "embedding"):
            self.carrier.note_outside(known, func)
        cast = getattr(func, "__name__", "") in _CASTS
        for value in (result,) if isinstance(result, Tensor) else result:
            if isinstance(value, Tensor) and value is not tensor and (cast or _same_memory(value, tensor)):
                self._computed[value] = known


def _same_memory(one: Tensor, other: Tensor) -> bool:
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor that has none of its own
        return False


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Without the watch, which is for Python outside fragments; modes that ops need themselves, as flex attention, stay."""
    watch = torch.overrides._get_current_function_mode()
    if not isinstance(watch, Watch):
        yield
        return
    with torch.overrides._pop_mode_temporarily():
        yield


def is_watched() -> bool:
    """Whether a model is being called in fragments, and what Python does between them looked at."""
    return any(isinstance(mode, Watch) for mode in torch.overrides._get_current_function_mode_stack())


torch._dynamo.eval_frame.skip_code(Watch.__torch_function__.__code__)  # as a frame of its own it must stay Python


def python_line() -> str:
    """The user's line that is running."""
    return user_line(traceback.extract_stack()) or "code outside the model"


def outside_text(name: str, line: str, *, captured: bool = True) -> str:
    """The message for a weight that would run dense. captured: with example inputs, so it could do without them."""
    if "checkpoint_sequential" in line:
        return (
            f"{name} is read by checkpoint_sequential, which TorchDynamo does not compile, so it would be dense there:\n"
            f"  {line}\nLoop over the parts with torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False) in its place"
            + ("" if captured else ", or give nm.compile example inputs")
        )
    other = (
        ""
        if captured
        else "; or give nm.compile example inputs, which takes layers that Dynamo never follows, as those of torch.ao's QAT"
    )
    return (
        f"{name} is read by code that TorchDynamo does not compile, so it would be dense there:\n  {line}\n"
        "Take the function that reads it out of torch._dynamo.disable, or whatever makes Dynamo skip it: a loop that branches "
        f"on data, for instance, which can go into a method of its own, and the layers that it calls into another{other}. "
        f"Or leave the weight dense with exclude={name!r}"
    )
