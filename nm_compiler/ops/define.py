"""Define ops of one's own: what a new method multiplies with in place of W, and what its input gradient goes through."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.ops.lean import custom_op
from nm_compiler.ops.weights import through, through_setup
from nm_compiler.wording import shown

Gradient = Callable[..., Tensor | tuple[Tensor, ...]]
"""(g, weight, masked, *other arguments of the op) -> dW, or (dW, dstate, ..), with g the gradient of what the op returned."""


def weight_op(name: str, *, gradient: Gradient) -> Callable[[Callable[..., Tensor]], Any]:
    """Turn ``f(weight, *state, **options) -> masked weight`` into the op ``name`` ("mine::my_weight"), with its gradient.

    f: plain torch code with annotated parameters (Tensor, int, float, bool, list[int]; `torch.library.custom_op` reads them),
    the weight first. It returns a new tensor of the weight's shape; it is put into the weight's strides here.
    gradient: gives that of the weight, or a tuple: that of the weight, then of arguments behind it, for state that learns.
    None for a tensor that learns, or another shape than it has, is an NMError in the backward pass. `torch.compile`, and so a
    live model, traces it: it must not branch on values. f may, compilers do not look into it.
    Returns the op, for `nm_compiler.passes.insert_op`. Raises NMError for a name or for parameters that make no op.
    """

    def make(function: Callable[..., Tensor]) -> Any:
        _check_takes(name, gradient, function)
        op = _defined(name, function)
        op.register_autograd(_backward(name, gradient), setup_context=_save)
        op._opoverload.stands_for_weight = True
        return op._opoverload

    return make


def backward_op(name: str) -> Callable[[Callable[..., Tensor]], Any]:
    """Turn ``f(masked weight, *state, **options) -> W * B`` into the op ``name``: what input gradients go through.

    f: as in `weight_op`, but of what stands for the weight in the forward product. Its own gradient, which only a penalty on
    input gradients has, goes straight through to that, and none to state: what learns has to be read by the `weight_op` too.
    Returns the op, for `nm_compiler.passes.insert_backward_op`. Raises NMError for a name or for parameters that make no op.
    """

    def make(function: Callable[..., Tensor]) -> Any:
        op = _defined(name, function)
        op.register_autograd(through, setup_context=through_setup)
        op._opoverload.makes_backward = True
        return op._opoverload

    return make


def _defined(name: str, function: Callable[..., Tensor]) -> Any:
    """The op without its gradient. Raises NMError."""
    if not re.fullmatch(r"[A-Za-z_]\w*::[A-Za-z_]\w*", name):
        raise NMError(f"an op called {name!r}: it needs a namespace of its own and a name, such as 'mine::my_weight'")
    try:
        schema = torch.library.infer_schema(function, mutates_args=())
    except ValueError as error:
        raise NMError(
            f"{name}: {error}. Annotate every parameter of {function.__name__}, and what it returns: "
            "(weight: Tensor, n: int, m: int, in_axis: int) -> Tensor"
        ) from error

    def forward(weight: Tensor, *rest: Any) -> Tensor:
        before = _versions(weight, *rest)
        found = function(weight, *rest)
        if _versions(weight, *rest) != before:
            raise NMError(
                f"{name} writes to its weight of {shown(weight)}, or to the state beside it: an op returns a new tensor, as "
                "weight * mask does and weight.mul_(mask) does not; state is changed in Method.advance()"
            )
        if not isinstance(found, Tensor) or found.shape != weight.shape or not found.is_floating_point():
            what = shown(found) if isinstance(found, Tensor) else type(found).__name__
            raise NMError(
                f"{name} returns {what} for a weight of {shown(weight)}: it is to return what is multiplied with in the "
                "place of the weight, numbers of its shape, such as torch.where(mask, weight, 0)"
            )
        return torch.empty_like(weight).copy_(found)

    op: Any = custom_op(name, schema=schema)(forward)
    op.register_fake(lambda weight, *rest: torch.empty_like(weight))
    return op


def _check_takes(name: str, gradient: Gradient, function: Callable[..., Tensor]) -> None:
    """Raise NMError if ``gradient`` cannot be called with what the backward pass of ``function`` has for it."""
    parameters = list(inspect.signature(function).parameters)
    given = ["g", *parameters[:1], "masked", *parameters[1:]]
    try:
        takes = inspect.signature(gradient)
    except ValueError:  # a function in C that does not tell
        return
    try:
        takes.bind(*given)
    except TypeError as error:
        raise NMError(
            f"the gradient of {name} does not take what it is given, {', '.join(given)} ({error}): write them all, or "
            "gradient=lambda g, *rest: g"
        ) from error


def _versions(*values: Any) -> list[int]:
    """How often each tensor was written to; those of inference mode do not count."""
    return [value._version for value in values if isinstance(value, Tensor) and not value.is_inference()]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *(value for value in inputs if isinstance(value, Tensor)))
    ctx.plain = [None if isinstance(value, Tensor) else (value,) for value in inputs]


_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException")  # torch's; importing them takes a second


def _backward(name: str, gradient: Gradient) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, *tensors = ctx.saved_tensors
        left = iter(tensors)
        weight, *rest = (next(left) if value is None else value[0] for value in ctx.plain)
        try:
            found = gradient(grad, weight, output, *rest)
        except Exception as error:
            if type(error).__name__ not in _DATA_DEPENDENT:
                raise
            raise NMError(
                f"the gradient of {name}, of a weight of {shown(weight)}, goes by a tensor's value, as `if float(state) > 0`: "
                "torch.compile traces it and has no values. Write torch.where there, or give the op that number as an option"
            ) from error
        several = found if isinstance(found, tuple) else (found,)
        given = *several, *(None for _ in range(1 + len(rest) - len(several)))
        for at, (value, learns) in enumerate(zip(given, ctx.needs_input_grad, strict=True)):
            if learns and value is None:
                what = "weight" if at == 0 else f"argument {at} behind it, which learns,"
                raise NMError(
                    f"the gradient of {name} gives None for its {what} of shape {list((weight, *rest)[at].shape)}: it would "
                    "never train. Return a tensor of that shape: (dW, dstate, ..) in the order of the op's arguments"
                )
            wanted = (weight, *rest)[at]
            if learns and value is not None and value.shape != wanted.shape:
                what = "its weight" if at == 0 else f"argument {at} behind it"
                raise NMError(
                    f"the gradient of {name} gives {shown(value)} for {what} of {shown(wanted)}: return a tensor of that shape"
                )
        return given

    return backward
