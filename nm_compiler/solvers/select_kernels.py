"""Compiled elementwise work under a mask, over memory as it lies: plain vectors, where `torch.where` goes one by one."""

from __future__ import annotations

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array


@jit
def select(bits: Array, mask: Array, out: Array) -> None:
    """``out = bits where mask else 0``. bits, out: int, the bits of floats; mask: uint8. All one-dimensional."""
    zero = bits.dtype.type(0)
    for i in range(bits.size):
        out[i] = bits[i] if mask[i] != 0 else zero


@jit
def both_gradients(grad: Array, weight: Array, mask: Array, grad_weight: Array, grad_scores: Array) -> None:
    """dW = mask * g, dS = W * dW. All one-dimensional."""
    zero = grad.dtype.type(0)
    for i in range(grad.size):
        through = grad[i] if mask[i] != 0 else zero
        grad_weight[i] = through
        grad_scores[i] = weight[i] * through
