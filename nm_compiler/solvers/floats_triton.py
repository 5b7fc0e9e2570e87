"""Arithmetic of Triton kernels that rounds as torch's does: 2-byte numbers are computed with in float32, rounded every time.

bfloat16 comes as int16 and is turned by its bits, so that nothing folds the rounding away and any processor gives the same.
Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def wide(given, brain: tl.constexpr):  # type: ignore[no-untyped-def]
    """As numbers to compute with: float32, or float64. given: floating, or the bits of bfloat16 (brain)."""
    if brain:
        value = (given.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif given.dtype == tl.float16:
        value = given.to(tl.float32)
    else:
        value = given
    return value


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def rounded(value, dtype: tl.constexpr, brain: tl.constexpr):  # type: ignore[no-untyped-def]
    """To the nearest number that can be stored, to the even one among two. dtype: of what is stored."""
    if brain:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(value == value, nearest, 0x7FC0).to(tl.int16)
    else:
        stored = value.to(dtype)
    return stored


def is_brain(tensor: Tensor) -> bool:
    """Whether it is bfloat16, which kernels get as `storable` whole numbers."""
    return tensor.dtype == torch.bfloat16


def storable(tensor: Tensor) -> Tensor:
    """What a kernel loads from and stores to: the tensor, or a view of bfloat16 as int16."""
    return tensor.view(torch.int16) if is_brain(tensor) else tensor
