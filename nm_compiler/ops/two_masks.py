"""Both weights of Bi-Mask from one pass over W, the second turned: what products on packed weights read.

The forward half is `nm.srste_weight` to the bit, its gradient too; the turned half is not differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nm_compiler.ops.lean import custom_op
from nm_compiler.solvers.select import decayed
from nm_compiler.solvers.two_masks import two_masks as masked_and_turned


@custom_op("nm::two_masks", mutates_args=())
def two_masks(weight: Tensor, order: Tensor | None, n: int, m: int, decay: float) -> tuple[Tensor, Tensor]:
    """``W * F`` ``[out, in]`` and ``((W * B)[order])^T`` ``[in, out]``, see `nm_compiler.solvers.two_masks`.

    weight: ``[out, in]``; order: int64 ``[out]``, or None if rows lie in their order. With g the gradient of the first:
    dW = g + decay * (1 - F) * W. Ref: Bi-Mask, eq. 8 and 10.
    """
    return masked_and_turned(weight, order, n, m)


@two_masks.register_fake
def _(weight: Tensor, order: Tensor | None, n: int, m: int, decay: float) -> tuple[Tensor, Tensor]:
    out, inputs = weight.shape
    return weight.new_empty(out, inputs), weight.new_empty(inputs, out)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nobody sends one to the turned half
    ctx.save_for_backward(inputs[0], output[0])
    ctx.decay = inputs[4]


def _backward(ctx: Any, grad: Tensor | None, _turned: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    weight, masked = ctx.saved_tensors
    return decayed(grad, weight, masked, ctx.decay), None, None, None, None


two_masks.register_autograd(_backward, setup_context=_setup)

TWO_MASKS = torch.ops.nm.two_masks.default


def turned_back(turned: Tensor, order: Tensor | None) -> Tensor:
    """``W * B`` ``[out, in]`` from its turned form."""
    ordered = turned.t()
    return ordered if order is None else torch.empty_like(ordered).index_copy_(0, order, ordered)
