"""Masks that are N:M along both axes: in every M x M tile at most N of each row and of each column are kept.

One such mask serves the forward product and, transposed, the backward one (Hubara et al., *Accelerated Sparse Neural
Training*, NeurIPS 2021). They find it by a 2-approximation; here it is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern


def transposable_mask(importance: Tensor, *, pattern: str | tuple[int, int] | Pattern, exactly: bool = False) -> Tensor:
    """The mask that keeps the most of ``importance`` with N or fewer in every row and column of every M x M tile.

    importance: ``[.., rows, columns]``, not negative, rows and columns multiples of M, any floating dtype and strides.
    exactly: N in every row and column, no fewer; that keeps a little less (a few tiles in a hundred differ).
    Returns bool of the same shape on the same device, computed on the CPU. The optimum of every tile, up to rounding.
    Raises NMError for other shapes, and for NaN, infinite or negative entries.
    """
    nm = Pattern.parse(pattern)
    if importance.ndim < 2:
        raise NMError(f"importance of shape {list(importance.shape)}: needs a matrix [rows, columns]")
    if importance.is_complex():
        raise NMError(f"importance of dtype {importance.dtype}: needs real numbers")
    rows, columns = importance.shape[-2:]
    if rows % nm.m or columns % nm.m:
        raise NMError(f"importance of shape {list(importance.shape)} does not divide into tiles of {nm.m} x {nm.m}")
    values = importance.detach().cpu()
    values = (values if values.dtype in (torch.float32, torch.float64) else values.float()).contiguous()
    out = torch.empty(values.shape, dtype=torch.bool)
    if values.numel():
        low, high = (float(end) for end in values.aminmax())
        if not (low >= 0 and high < math.inf):
            kind = "negative" if low < 0 and high < math.inf else "NaN or infinite"
            raise NMError(f"importance of shape {list(importance.shape)} has {kind} entries: pass magnitudes, weight.abs()")
        from nm_compiler.solvers import transposable_kernels as kernels
        from nm_compiler.solvers.two_of_four_kernels import two_of_four

        given, target = values.view(-1, rows, columns), out.view(torch.uint8).view(-1, rows, columns).numpy()
        if (nm.n, nm.m) == (2, 4):
            two_of_four(given.numpy(), target, exactly)
        else:
            kernels.any_of_any(given.double().numpy(), target, nm.n, nm.m, exactly, kernels.comparators(nm.n, nm.m))
    return out.to(importance.device)
