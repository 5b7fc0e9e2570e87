"""Both masks of Bi-Mask at once, each weight lying as its product's sparse operand wants it: groups along rows.

    W * F                   [out, in], N of every M along `in`          for y = x (W * F)^T
    ((W * B)[order])^T      [in, out], N of every M along `out`         for dx = g[:, order] ((W * B)[order])

On CUDA one Triton kernel reads the weight once and writes both; elsewhere the masks of `nm_compiler.solvers.masks`. All
agree to the bit. Ref: Bi-Mask, eq. 8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nm_compiler.solvers.masks import keep_largest, on_gpu

_WIDEST = 16  # of the Triton kernel, whose module cannot be imported everywhere


def two_masks(weight: Tensor, order: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    """``W * F`` and ``((W * B)[order])^T``, both contiguous, no gradient.

    weight: floating ``[out, in]``, both multiples of ``m``; order: int64 ``[out]``, ``new[i] = old[order[i]]``, or None for
    rows that lie in their order. F keeps the ``n`` largest magnitudes of every ``m`` along `in`; B, of what F left, the ``n``
    largest of every ``m`` rows in the order. The lower index wins among equals, and NaN counts as the largest of all.
    """
    if on_gpu(weight) and m <= _WIDEST and m & (m - 1) == 0:
        found: tuple[Tensor, Tensor] = _triton().two_masks(weight, order, n, m)
        return found
    forward = keep_largest(weight, n, m, 1).contiguous()
    ordered = forward if order is None else forward.index_select(0, order)
    return forward, keep_largest(ordered, n, m, 0).t().contiguous()


def _triton() -> Any:
    import nm_compiler.solvers.two_masks_triton as kernels

    return kernels
