"""Products with two weights: one for y, one for the gradient of x. The nodes of Bi-Mask.

    y = x W_f^T + b        dx = g W_b        dW_f = g^T x        db = sum of g

dW_f is dense and goes straight through to the weight; W_b gets a gradient only where that of x is differentiated once more.
Ref: Bi-Mask, section 3.2.
A convolution's gradients are real convolution kernels, so there is no unfolded copy of the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nm_compiler.ops.lean import custom_op
from nm_compiler.ops.made_of import made_of


def no_view(result: Tensor) -> Tensor:
    """The same values in the same memory, for an op to return: autograd forbids to change the view that an op returned.

    A product over three axes is a view of one over two, and so is a convolution along one axis.
    """
    return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result


@custom_op("nm::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, backward_weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: ``[*, in]``, weights ``[out, in]``, bias ``[out]`` or None. Returns ``[*, out]``."""
    return no_view(torch.nn.functional.linear(x, weight, bias))


@made_of("linear")
@linear.register_fake
def _(x: Tensor, weight: Tensor, backward_weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _weight, backward_weight, _bias = inputs
    ctx.save_for_backward(x, backward_weight)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, backward_weight = ctx.saved_tensors
    need_x, need_weight, _, need_bias = ctx.needs_input_grad
    flat = grad.reshape(-1, grad.shape[-1])
    return (
        (flat @ backward_weight).view(x.shape) if need_x else None,
        flat.T @ x.reshape(-1, x.shape[-1]) if need_weight else None,
        None,
        flat.sum(0) if need_bias else None,
    )


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@custom_op("nm::conv", mutates_args=())
def conv(
    x: Tensor,
    weight: Tensor,
    backward_weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """x: ``[batch, in, *space]`` (1 to 3 space axes), weights ``[out, in / groups, *taps]``. As `aten.convolution`."""
    return no_view(torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups))


@made_of("conv")
@conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    backward_weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _weight, backward_weight, bias, *geometry = inputs
    ctx.save_for_backward(x, backward_weight)
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.geometry = geometry


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, backward_weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    need_x, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    # one call gives dx = conv^T(g, W_b), dW = corr(g, x), which does not read the weight's values, and db
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, backward_weight, ctx.bias_sizes, stride, padding, dilation, False, [0] * len(stride), groups,
        [need_x, need_weight, need_bias],
    )  # fmt: skip
    return grad_x, grad_weight, None, grad_bias, None, None, None, None


conv.register_autograd(_conv_backward, setup_context=_conv_setup)


_autocast = torch.library.Library("nm", "IMPL")  # kept: the registrations live as long as this object


def under_autocast(name: str) -> None:
    """Under autocast, cast the floating tensors of ``nm::name`` to its dtype, as torch does for its own products."""
    for device, suffix in (("cpu", "CPU"), ("cuda", "CUDA")):
        _autocast.impl(name, _casting(getattr(torch.ops.nm, name), device), f"Autocast{suffix}")


def _casting(op: Any, device: str) -> Any:
    """Cast, then call the op below autocast."""
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA

    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        castable = (torch.float32, torch.float16, torch.bfloat16)
        cast = [a.to(dtype) if isinstance(a, Tensor) and a.dtype in castable else a for a in args]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*cast)

    return cast_and_call


under_autocast("linear")
under_autocast("conv")
