"""What tensors are called in messages and reports."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


def shown(tensor: Tensor) -> str:
    """Shape, dtype and device of an operand.

    >>> shown(torch.zeros(2, 3))
    '[2, 3] (float32, cpu)'
    """
    return f"{list(tensor.shape)} ({dtype_name(tensor.dtype)}, {tensor.device})"
