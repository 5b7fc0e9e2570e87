"""How a batch of images lies in memory."""

from __future__ import annotations

from torch import Tensor


def lies_in_channels_last(value: Tensor) -> bool:
    """Whether an image batch has its channels innermost, by its strides: of symbolic sizes torch 2.11 does not say."""
    return value.ndim == 4 and value.stride(1) == 1 and value.stride(3) != 1
