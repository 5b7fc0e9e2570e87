"""Count the non-zeros of a weight and of its groups. -0.0 is zero, NaN is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nm_compiler.solvers.search_members import Array

_SMALL = 1 << 15  # below, torch is done before a kernel is found
_BITS = {
    torch.float16: (torch.int16, np.uint16), torch.bfloat16: (torch.int16, np.uint16), torch.float32: (torch.int32, np.uint32),
    torch.float64: (torch.int64, np.uint64),
}  # fmt: skip


def worst_group(weight: Tensor, m: int, axis: int) -> int:
    """The largest number of non-zeros in a group of ``m`` consecutive weights along ``axis``.

    ``size(axis)`` must be a multiple of ``m``. Returns 0 for an empty weight.
    """
    found = _bits(weight)
    if found is not None:
        from nm_compiler.solvers.check_kernels import most_nonzeros

        inner = weight.shape[axis % weight.ndim + 1 :].numel()
        return int(most_nonzeros(m)(found[0].reshape(-1, m, inner), found[1]))
    groups = weight.detach().movedim(axis, -1).unflatten(-1, (-1, m))
    counts = (groups != 0).sum(-1, dtype=torch.uint8 if m < 256 else torch.int64)  # int64 would be half the weight
    return int(counts.max()) if weight.numel() else 0


def nonzeros(weight: Tensor) -> int:
    """How many entries are not zero; NaN counts, -0.0 does not. weight: any shape, dtype and strides."""
    found = _bits(weight)
    if found is not None:
        from nm_compiler.solvers import check_kernels

        return int(check_kernels.nonzeros(found[0].reshape(-1), found[1]))
    return int((weight.detach() != 0).sum())


def _bits(weight: Tensor) -> tuple[Array, Any] | None:
    """A weight on the CPU as unsigned numbers in its own order, and all bits but the sign; None where torch does it."""
    plain = weight.device.type == "cpu" and weight.layout == torch.strided and weight.dtype in _BITS
    if not plain or weight.numel() < _SMALL:
        return None
    signed, unsigned = _BITS[weight.dtype]
    keys = weight.detach().contiguous().view(signed).numpy().view(unsigned)
    return keys, unsigned(2 ** (8 * keys.itemsize - 1) - 1)
