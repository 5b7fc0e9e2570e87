"""``nm::no_gradient``: results of kernels that know no gradient, which say so when one is asked for.

    before    y = lowered(x)    # torch goes on without the packed products: what a residual carries past them would be all
    after     y = lowered(x)    # the same values; y.sum().backward() is an NMError

Calls under `torch.no_grad()`, and of inputs that want no gradient, do not come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nm_compiler.errors import NMError
from nm_compiler.ops.lean import custom_op


@custom_op("nm::no_gradient", mutates_args=())
def no_gradient(value: Tensor, asks: Tensor, title: str) -> Tensor:
    """The same values, whose gradient is an NMError. asks: a tensor that wants one; title: of the model, for the message."""
    return value.clone()


@no_gradient.register_fake
def _(value: Tensor, asks: Tensor, title: str) -> Tensor:
    return torch.empty_like(value)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.title = inputs[2]


def _backward(ctx: Any, _: Tensor) -> NoReturn:
    raise _refusal(ctx.title)


no_gradient.register_autograd(_backward, setup_context=_setup)


def without_gradients(outputs: Sequence[Any], inputs: Sequence[Any], title: str) -> list[Any]:
    """The outputs of a lowered model as autograd should see them, computed from ``inputs``. Raises NMError in forward mode."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
        raise _refusal(title)
    asks = next((each for each in tensors if each.requires_grad), None) if torch.is_grad_enabled() else None
    if asks is None:
        return list(outputs)
    return [_said(value, tensors, asks, title) for value in outputs]


def _said(value: Any, inputs: Sequence[Tensor], asks: Tensor, title: str) -> Any:
    """An output that is an input as it came has the gradient of that."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or any(value is each for each in inputs):
        return value
    return torch.ops.nm.no_gradient.default(value, asks, title)


def _refusal(title: str) -> NMError:
    return NMError(
        f"this {title} is lowered to kernels that have no gradient, and one is asked for: call it under torch.no_grad() where "
        "none is needed, as for evaluation or a teacher, or take gradients of the model that was lowered, or of "
        'nm.lower(..., backend="dense")'
    )
