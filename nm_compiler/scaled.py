"""A weight times a factor a row, not computed before it is read: what a fold holds until its value has to stay.

    Scaled(weight, factor, dtype)   the weight that somebody else holds, and one number for each row
    any op on it                    computes the product, which is gone when the op has returned
    keep(module)                    computes it once, for good

So a graph can be rewritten, packed, written and checked while the only whole copy of its weights is the user's own, and the
folded ones are there one at a time. Every time the value is the same to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.errors import NMError
from nm_compiler.memory import give_back

_AT_ONCE = 1 << 13  # weights that are there in float64 at a time
_LARGE = 1 << 20  # bytes


class Scaled(Tensor):
    """A tensor without memory of its own: to every op it is what `value` returns.

    weight: ``[out, ...]``; factor: float64 ``[out]``; dtype: of the product, which is computed in float64 and rounded once.
    It is the product of now: `value` raises NMError once somebody has written to the weight.
    """

    weight: Tensor
    factor: Tensor
    version: int | None

    @staticmethod
    def __new__(cls, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Scaled:
        like = torch.empty_like(weight, dtype=dtype, device="meta")
        make: Any = Tensor._make_wrapper_subclass
        made = cast(Scaled, make(cls, like.shape, strides=like.stride(), dtype=dtype, device=weight.device))
        made.weight, made.factor, made.version = weight.detach(), factor, _version(weight)
        return made

    def value(self) -> Tensor:
        """The product, in memory of its own, laid out as the weight is. Only a few rows at a time are there in float64.

        Raises NMError if the weight was written to since.
        """
        if self.version != _version(self.weight):
            raise NMError(
                f"a weight of shape {list(self.shape)} was written to after nm.lower: its fold no longer fits it. "
                "Lower the model again, or call the lowered one once before you go on training"
            )
        with torch.no_grad():
            into = torch.empty_like(self.weight, dtype=self.dtype)
            rows = max(1, _AT_ONCE // max(1, self.weight[:1].numel()))
            shape = (-1, *[1] * (self.weight.ndim - 1))
            for place, part, factor in zip(*(t.split(rows) for t in (into, self.weight, self.factor)), strict=True):
                place.copy_(part.double() * factor.view(shape))
        return into

    def stand_in(self, *, read: bool) -> Tensor:
        """A tensor of the same sizes, strides and dtype, and other values: the weight itself wherever it fits.

        read: somebody computes with it, if only to take the time; else what does not fit is a tensor that nobody wrote.
        """
        if self.weight.dtype == self.dtype and self.weight.stride() == self.stride():
            return self.weight
        return self.value() if read else torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Scaled({list(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            same = Scaled(args[0].weight, args[0].factor, args[0].dtype)
            same.weight, same.version = args[0].weight, args[0].version  # a view made here would count from zero
            return same
        args, kwargs = pytree.tree_map_only(Scaled, Scaled.value, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _version(weight: Tensor) -> int | None:
    """How often it was written to, which its views share; None for tensors of inference mode, which do not count."""
    return None if weight.is_inference() else weight._version


def value_if_scaled(value: Tensor) -> Tensor:
    """A plain tensor: what a `Scaled` one stands for, any other as it is."""
    return value.value() if isinstance(value, Scaled) else value


@contextlib.contextmanager
def stood_in(*modules: nn.Module, read: bool) -> Iterator[None]:
    """Inside, `Scaled` buffers are stand-ins: to take times (read), or to export, which depend on sizes and layouts alone."""
    scaled = [
        (each, name, buffer)
        for module in modules
        for each in module.modules()
        for name, buffer in each._buffers.items()
        if isinstance(buffer, Scaled)
    ]
    try:
        for each, name, buffer in scaled:
            each._buffers[name] = buffer.stand_in(read=read)
        yield
    finally:
        for each, name, buffer in scaled:
            each._buffers[name] = buffer


def keep(module: nn.Module) -> None:
    """Give all `Scaled` buffers of a module and of its children memory of their own, one by one, in place.

    What is free goes back to the system on the way: the holes that large temporaries leave would add up.
    """
    for each in module.modules():
        for name, buffer in list(each._buffers.items()):
            if isinstance(buffer, Scaled):
                each._buffers[name] = buffer.value()
                if buffer.nbytes >= _LARGE:
                    give_back()
