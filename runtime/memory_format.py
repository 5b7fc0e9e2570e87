"""How a batch of images lies in memory."""

from __future__ import annotations

from torch import Tensor


def lies_in_channels_last(value: Tensor) -> bool:
    """Whether an image batch has its channels innermost, by its strides: of symbolic sizes torch 2.11 does not say.

    Not, where only data will tell a stride.
    """
    if value.ndim != 4:
        return False
    channels, pixels = value.stride(1), value.stride(3)
    if isinstance(channels, int) and isinstance(pixels, int):
        return channels == 1 and pixels != 1
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(channels == 1) and guard_or_false(pixels != 1)
