"""``nm::cslt_train_linear``: a linear of Bi-Mask with both sparse products on sparse tensor cores, packed in every call.

    y = x (W * F)^T + b        pack(W * F)                 the sparse operand is [out, in], 2:4 along `in`
    dx = g (W * B)             pack(((W * B)[order])^T)    the sparse operand is [in, out], 2:4 along `out`
    dW = g^T x                 dense, straight through

Weights change in every step, so a step packs twice. The backward groups are neighbours only in the order, so g is put into it
as well, which `BiMask(fold=True)` saves. Where the library cannot run, or there are too few tokens to pay for it, the same
numbers come from masked dense products, which is decided at every call; strides do not depend on it.
On a GPU it ran with both weights packed by the library, which took most of the time (docs/cusparselt.md); not yet with our own
kernels for that. Ref: Bi-Mask, section 3.2; Mishra et al. 2021.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.ops.products import under_autocast
from nm_compiler.ops.two_masks import turned_back
from nm_compiler.runtime.cusparselt.compress import compress
from nm_compiler.runtime.cusparselt.eligible import machine_of, of_dtype, of_machine, of_sizes, of_tokens
from nm_compiler.runtime.cusparselt.op import aligned, multiply


def why_dense(x: Tensor, weight: Tensor, least: int) -> str | None:
    """Why this call multiplies densely; None if it packs. x: ``[tokens, k]``; weight: the sparse operand ``[.., k]``."""
    tokens: int = x.shape[0]
    found = chain(
        of_dtype(x.dtype), of_sizes(weight.shape, x.dtype), of_tokens(tokens, max(least, 1)), of_machine(machine_of(x.device))
    )
    return next(iter(found), None)


@torch.library.custom_op("nm::cslt_train_linear", mutates_args=())
def cslt_train_linear(
    x: Tensor, weight: Tensor, turned: Tensor, order: Tensor | None, bias: Tensor | None, least: int, columns: bool
) -> Tensor:
    """``x weight^T + bias``, whose input gradient goes through ``turned``.

    x: ``[tokens, in]``; weight, turned, order: of ``nm::two_masks``; least: tokens below which it stays dense.
    columns: leave the result as the library writes it, of strides ``(1, tokens)``; else it is contiguous.
    """
    if why_dense(x, weight, least) is None:
        return _laid(_packed(weight, x, bias), columns)
    if not columns:
        return functional.linear(x, weight, bias)
    result = weight @ x.t() if bias is None else torch.addmm(bias.unsqueeze(1), weight, x.t())
    return _laid(result, columns)


@cslt_train_linear.register_fake
def _(
    x: Tensor, weight: Tensor, turned: Tensor, order: Tensor | None, bias: Tensor | None, least: int, columns: bool
) -> Tensor:
    return _empty(x, weight.shape[0], columns)


@torch.library.custom_op("nm::cslt_input_grad", mutates_args=())
def cslt_input_grad(grad: Tensor, turned: Tensor, order: Tensor | None, least: int, columns: bool) -> Tensor:
    """The gradient of x, ``[tokens, in]``. grad: ``[tokens, out]``; the rest as in ``nm::cslt_train_linear``."""
    if why_dense(grad, turned, least) is None:
        return _laid(_packed(turned, grad if order is None else _ordered(grad, order), None), columns)
    weight = turned_back(turned, order)
    return _laid(weight.t() @ grad.t(), columns) if columns else grad @ weight


@cslt_input_grad.register_fake
def _(grad: Tensor, turned: Tensor, order: Tensor | None, least: int, columns: bool) -> Tensor:
    return _empty(grad, turned.shape[0], columns)


def _packed(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """``weight x^T + bias``, ``[.., tokens]``. weight: 2:4 because ``nm::two_masks`` made it, so nothing is checked."""
    added = None if bias is None else aligned(bias.contiguous())
    return multiply(compress(weight), x, added, weight.shape[0], rows=False).t()


def _ordered(grad: Tensor, order: Tensor) -> Tensor:
    """Columns of ``grad`` in the order, laid as they were."""
    if grad.is_contiguous():
        return grad.index_select(1, order)
    return grad.t().index_select(0, order).t()


def _laid(result: Tensor, columns: bool) -> Tensor:
    """``[out, tokens]`` as ``[tokens, out]``; turned in place: autograd lets nobody write into a view that an op returns."""
    if not columns:
        return result.t().contiguous()
    out, tokens = result.shape
    return result.contiguous().as_strided_((tokens, out), (1, tokens))


def _empty(x: Tensor, width: int, columns: bool) -> Tensor:
    tokens = x.shape[0]
    return torch.empty_strided((tokens, width), (1, tokens) if columns else (width, 1), dtype=x.dtype, device=x.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _weight, turned, order, _bias, ctx.least, _columns = inputs
    ctx.save_for_backward(x, turned, order)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, turned, order = ctx.saved_tensors
    need_x, need_weight, _, _, need_bias, *_ = ctx.needs_input_grad
    like_x = x.stride(1) != 1  # the op before wants its gradient laid as its result
    return (
        torch.ops.nm.cslt_input_grad(grad, turned, order, ctx.least, like_x) if need_x else None,
        grad.t() @ x if need_weight else None,
        None,
        None,
        grad.sum(0) if need_bias else None,
        None,
        None,
    )


cslt_train_linear.register_autograd(_backward, setup_context=_setup)
under_autocast("cslt_train_linear")
