"""An einsum with two weights, one for y and one for the gradient of x: Bi-Mask's product where `nm.linear` is too narrow.

    y = einsum("bei,eoi->beo", x, W_f)       dx = einsum("beo,eoi->bei", g, W_b)       dW_f = einsum("beo,bei->eoi", g, x)

As many products as a dense einsum has, forward and backward. It serves batched experts, weights on the left and any
einsum in which every letter of x is one of the weight's or of the result's, and every letter of the weight one of x's or
of the result's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nm_compiler.ops.lean import custom_op
from nm_compiler.ops.products import no_view, under_autocast


@custom_op("nm::einsum", mutates_args=())
def einsum(x: Tensor, weight: Tensor, backward_weight: Tensor, equation: str) -> Tensor:
    """equation: ``x's letters, weight's letters -> result's``, without an ellipsis. Axes of size 1 broadcast."""
    return no_view(torch.einsum(equation, x, weight).contiguous())  # an op's result may not be a view of its input


@einsum.register_fake
def _(x: Tensor, weight: Tensor, backward_weight: Tensor, equation: str) -> Tensor:
    sizes: dict[str, Any] = {}
    inputs, out = equation.split("->")
    for term, tensor in zip(inputs.split(","), (x, weight), strict=True):
        for letter, size in zip(term, tensor.shape, strict=True):
            if letter not in sizes or (isinstance(sizes[letter], int) and sizes[letter] == 1):
                sizes[letter] = size
    return x.new_empty([sizes[letter] for letter in out])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, backward_weight, ctx.equation = inputs
    ctx.save_for_backward(x, backward_weight)
    ctx.weight_shape = weight.shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, backward_weight = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    inputs, out = ctx.equation.split("->")
    term, weight_term = inputs.split(",")
    return (
        torch.einsum(f"{out},{weight_term}->{term}", grad, backward_weight).sum_to_size(x.shape) if need_x else None,
        torch.einsum(f"{out},{term}->{weight_term}", grad, x).sum_to_size(ctx.weight_shape) if need_weight else None,
        None,
        None,
    )


einsum.register_autograd(_backward, setup_context=_setup)
under_autocast("einsum")
