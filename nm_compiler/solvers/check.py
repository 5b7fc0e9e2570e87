"""Count the non-zeros of the groups of a weight."""

from __future__ import annotations

import torch
from torch import Tensor


def worst_group(weight: Tensor, m: int, axis: int) -> int:
    """The largest number of non-zeros in a group of ``m`` consecutive weights along ``axis``; NaN counts as one.

    ``size(axis)`` must be a multiple of ``m``. Returns 0 for an empty weight.
    """
    groups = weight.detach().movedim(axis, -1).unflatten(-1, (-1, m))
    counts = (groups != 0).sum(-1, dtype=torch.uint8 if m < 256 else torch.int64)  # int64 would be half the weight
    return int(counts.max()) if weight.numel() else 0
