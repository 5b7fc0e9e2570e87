"""What tensors, errors and several names are called in messages and reports."""

from __future__ import annotations

from collections.abc import Sequence

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


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says first; its kind where it says nothing.

    >>> first_line(ValueError("no such axis\\nwhile tracing")), first_line(ValueError())
    ('no such axis', 'ValueError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def several(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are.

    >>> several(["fc1", "fc2", "fc3"], 2)
    'fc1, fc2 and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
