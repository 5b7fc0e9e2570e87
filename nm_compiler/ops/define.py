"""Define an op of one's own that stands for a weight: what a new method multiplies with in place of W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.ops.lean import custom_op

Gradient = Callable[..., Tensor | tuple[Tensor, ...]]
"""(g, weight, masked, *other arguments of the op) -> dW, or (dW, dstate, ..), with g the gradient of what the op returned."""


def weight_op(name: str, *, gradient: Gradient) -> Callable[[Callable[..., Tensor]], Any]:
    """Turn ``f(weight, *state, **options) -> masked weight`` into the op ``name`` ("mine::my_weight"), with its gradient.

    f: plain torch code with annotated parameters (Tensor, int, float, bool, list[int]; `torch.library.custom_op` reads them),
    the weight first. It returns a new tensor of the weight's shape; it is put into the weight's strides here.
    gradient: gives that of the weight, or a tuple: that of the weight, then of arguments behind it, for state that learns.
    None for a tensor that learns is an NMError in the backward pass.
    Returns the op, for `nm_compiler.passes.insert_op`.
    """

    def make(function: Callable[..., Tensor]) -> Any:
        def forward(weight: Tensor, *rest: Any) -> Tensor:
            return torch.empty_like(weight).copy_(function(weight, *rest))

        schema = torch.library.infer_schema(function, mutates_args=())
        op: Any = custom_op(name, schema=schema)(forward)
        op.register_fake(lambda weight, *rest: torch.empty_like(weight))
        op.register_autograd(_backward(name, gradient), setup_context=_save)
        overload = op._opoverload
        overload.stands_for_weight = True
        return overload

    return make


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *(value for value in inputs if isinstance(value, Tensor)))
    ctx.plain = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _backward(name: str, gradient: Gradient) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, *tensors = ctx.saved_tensors
        left = iter(tensors)
        weight, *rest = (next(left) if value is None else value[0] for value in ctx.plain)
        found = gradient(grad, weight, output, *rest)
        several = found if isinstance(found, tuple) else (found,)
        given = *several, *(None for _ in range(1 + len(rest) - len(several)))
        for at, (value, learns) in enumerate(zip(given, ctx.needs_input_grad, strict=True)):
            if learns and value is None:
                what = "weight" if at == 0 else f"argument {at} behind it, which learns,"
                raise NMError(
                    f"the gradient of {name} gives None for its {what} of shape {list((weight, *rest)[at].shape)}: it would "
                    "never train. Return a tensor of that shape: (dW, dstate, ..) in the order of the op's arguments"
                )
        return given

    return backward
