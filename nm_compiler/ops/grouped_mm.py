"""A grouped matmul of experts with two weights, one for y and one for the gradient of x: Bi-Mask's experts.

    rows of x, sorted by expert:   y[s:e] = x[s:e] W_f[k]      dx[s:e] = g[s:e] W_b[k]^T      dW_f[k] = x[s:e]^T g[s:e]

for expert k with rows s to e, ``offs[k] = e``. As many products as the dense op, forward and backward. Rows behind the last
offset belong to no expert: zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nm_compiler.ops.lean import custom_op


@custom_op("nm::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, backward_weight: Tensor, offs: Tensor, native: bool) -> Tensor:
    """x: ``[rows, in]``, weights ``[experts, in, out]``, offs: integers ``[experts]``. Returns ``[rows, out]``.

    native: take `aten._grouped_mm` (half and bfloat16 on a GPU); otherwise one product an expert, in any dtype.
    """
    if native and x.is_cuda:
        return torch.ops.aten._grouped_mm(x, weight, offs)  # type: ignore[no-any-return]
    result = x.new_zeros(x.shape[0], weight.shape[2])
    for expert, rows in _spans(offs):
        torch.mm(x[rows], weight[expert], out=result[rows])
    return result


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, backward_weight: Tensor, offs: Tensor, native: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@custom_op("nm::grouped_mm_weight", mutates_args=())
def grouped_mm_weight(x: Tensor, grad: Tensor, like: Tensor, offs: Tensor, native: bool) -> Tensor:
    """The gradient of the weight, ``[experts, in, out]``, with the strides of ``like``; zero for an expert without rows."""
    if native and x.is_cuda:
        return torch.empty_like(like).copy_(torch.ops.aten._grouped_mm(x.T, grad, offs))
    result = torch.zeros_like(like)
    for expert, rows in _spans(offs):
        torch.mm(x[rows].T, grad[rows], out=result[expert])
    return result


@grouped_mm_weight.register_fake
def _(x: Tensor, grad: Tensor, like: Tensor, offs: Tensor, native: bool) -> Tensor:
    return torch.empty_like(like)


def _spans(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    begin = 0
    for expert, end in enumerate(offs.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = max(begin, end)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _weight, backward_weight, offs, ctx.native = inputs
    ctx.save_for_backward(x, backward_weight, offs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, backward_weight, offs = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    grad, turned = grad.contiguous(), backward_weight.transpose(1, 2)
    return (
        torch.ops.nm.grouped_mm(grad, turned, turned, offs, ctx.native) if need_x else None,
        torch.ops.nm.grouped_mm_weight(x, grad, backward_weight, offs, ctx.native) if need_weight else None,
        None,
        None,
        None,
    )


grouped_mm.register_autograd(_backward, setup_context=_setup)
