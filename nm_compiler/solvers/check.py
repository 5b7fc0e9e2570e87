"""Count the non-zeros of the groups of a weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 15  # below, torch is done before a kernel is found
_BITS = {
    torch.float16: (torch.int16, np.uint16), torch.bfloat16: (torch.int16, np.uint16), torch.float32: (torch.int32, np.uint32),
    torch.float64: (torch.int64, np.uint64),
}  # fmt: skip


def worst_group(weight: Tensor, m: int, axis: int) -> int:
    """The largest number of non-zeros in a group of ``m`` consecutive weights along ``axis``; NaN counts as one.

    ``size(axis)`` must be a multiple of ``m``. Returns 0 for an empty weight.
    """
    weight = weight.detach()
    if weight.numel() >= _SMALL and weight.device.type == "cpu" and weight.dtype in _BITS and weight.layout == torch.strided:
        from nm_compiler.solvers.check_kernels import most_nonzeros

        signed, unsigned = _BITS[weight.dtype]
        inner = weight.shape[axis % weight.ndim + 1 :].numel()
        keys = weight.contiguous().view(signed).numpy().view(unsigned).reshape(-1, m, inner)
        return int(most_nonzeros(keys, unsigned(2 ** (8 * keys.itemsize - 1) - 1)))
    groups = weight.movedim(axis, -1).unflatten(-1, (-1, m))
    return int((groups != 0).sum(-1).max()) if weight.numel() else 0
