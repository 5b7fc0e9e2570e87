"""How much a weight matters, beyond its magnitude: tensors in, tensors out. Any of these goes into masks and order searches.

weight: floating, any shape; squares: the sum of squares of what each weight was multiplied with, broadcastable to the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nm_compiler.errors import NMError

_UNSEEN = 1e-12
"""The norm of an input that was always zero, beside the largest: magnitude decides among such, as without any token."""


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """``|W| * ||x||``: magnitude times the norm of the input it meets. Ref: Sun et al., *Wanda*, ICLR 2024, eq. 1.

    Returns float32 (float64 for such weights) of the weight's shape. Raises NMError for shapes that do not fit.
    """
    return magnitude(weight).mul_(_norms(weight, squares))


def ria(
    weight: Tensor, squares: Tensor, *, out_axis: int, row_axes: Sequence[int], power: float = 0.5,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """``(|W| / sum of its row + |W| / sum of its column) * ||x|| ** power``. Ref: Zhang et al., *RIA*, ICLR 2024, eq. 4.

    row_axes: all that one output sums over, the taps of a convolution included; a column lies along ``out_axis``. power: of
    the norm; 0 leaves the inputs out. sums: of magnitudes by row and by column, axes kept, where ``weight`` is but a part of
    the whole. Returns as `wanda`.
    """
    size = magnitude(weight)
    tiny = torch.finfo(size.dtype).tiny
    row, column = sums or (size.sum(tuple(row_axes), keepdim=True), size.sum(out_axis, keepdim=True))
    found = row.clamp_min(tiny).reciprocal() + column.clamp_min(tiny).reciprocal()
    found *= size  # before the norms: a row and a column of zeros stay zero
    found *= _norms(weight, squares) ** power
    return found


def saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|W * dL/dW|``: what the loss changes by, to first order, without the weight. Ref: Molchanov et al., CVPR 2019.

    Returns as `wanda`. Raises NMError for shapes that do not fit.
    """
    if gradient.shape != weight.shape:
        raise NMError(f"a gradient of shape {list(gradient.shape)} for a weight of shape {list(weight.shape)}")
    return (_wide(weight) * gradient.detach().to(weight.device)).abs()


def magnitude(weight: Tensor) -> Tensor:
    """``|W|``, float32 (float64 for such weights), in memory of its own."""
    wide = _wide(weight)
    return wide.abs() if wide.dtype == weight.dtype else wide.abs_()  # a conversion has made memory already


def _wide(weight: Tensor) -> Tensor:
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


def _norms(weight: Tensor, squares: Tensor) -> Tensor:
    try:
        fits = torch.broadcast_shapes(weight.shape, squares.shape) == weight.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise NMError(f"inputs of shape {list(squares.shape)} were measured, the weight has {list(weight.shape)}")
    norms = squares.to(weight.device).sqrt()
    if not norms.numel():
        return norms.to(_wide(weight).dtype)
    largest = norms.max()
    return norms.clamp_min(torch.where(largest > 0, largest * _UNSEEN, 1.0)).to(_wide(weight).dtype)
