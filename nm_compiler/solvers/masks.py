"""Magnitude masks as fast as memory allows: the N largest of every M along any axis.

On the CPU a compiled kernel (the first call for a pattern compiles it, about a second, kept on disk); on other devices the
torch operations of `nm_compiler.solvers.magnitude`. Ref for the comparison: benchmarks/solvers.py.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.search_members import Array

_BITS: dict[torch.dtype, type[np.unsignedinteger[Any]]] = {
    torch.float16: np.uint16, torch.bfloat16: np.uint16, torch.float32: np.uint32, torch.float64: np.uint64
}  # fmt: skip
_PIECE = 1 << 16  # numbers that are masked while they lie in the second cache

PatternLike = str | tuple[int, int] | Pattern


def top_mask(
    weight: Tensor, *, pattern: PatternLike, axis: int = -1, form: Literal["bool", "uint8", "bits"] = "bool"
) -> Tensor:
    """1 where a weight is among the N largest magnitudes of its M along ``axis``; the lower index wins among equals.

    weight: float16, bfloat16, float32 or float64, any strides and device. NaN counts as the largest of all, so that it
    stays where it is seen. Exactly N ones in every group.
    Returns bool or uint8 of the weight's shape and strides, or ``"bits"``: uint8 ``[.., ceil(last / 8)]``, the mask's last
    axis packed, bit ``k % 8`` of byte ``k // 8``. Raises NMError if M does not divide the axis, or for another dtype.
    """
    nm = _checked(weight, pattern, axis)
    if form not in ("bool", "uint8", "bits"):
        raise NMError(f"form={form!r}: choose 'bool', 'uint8' or 'bits'")
    mask = _compiled(weight, nm, axis)[0] if _has_kernel(weight) else magnitude_mask(weight, nm.n, nm.m, axis)
    if form == "bits":
        packed = np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(packed).to(weight.device)
    return mask.view(torch.uint8) if form == "uint8" else mask


def masked(weight: Tensor, *, pattern: PatternLike, axis: int = -1) -> Tensor:
    """``weight * top_mask(weight)`` in one pass over memory, a new tensor of the weight's shape and strides, no gradient.

    Same errors as `top_mask`.
    """
    nm = _checked(weight, pattern, axis)
    if _has_kernel(weight):
        return _compiled(weight, nm, axis, multiply=True)[1]
    detached = weight.detach()
    return torch.where(magnitude_mask(detached, nm.n, nm.m, axis), detached, detached.new_zeros(()))


def _checked(weight: Tensor, pattern: PatternLike, axis: int) -> Pattern:
    nm = Pattern.parse(pattern)
    if weight.dtype not in _BITS:
        raise NMError(f"a weight of dtype {weight.dtype}: needs float16, bfloat16, float32 or float64")
    if not -weight.ndim <= axis < weight.ndim:
        raise NMError(f"axis={axis} of a weight of shape {list(weight.shape)}")
    if weight.shape[axis] % nm.m:
        length = weight.shape[axis]
        raise NMError(f"axis {axis} of shape {list(weight.shape)}: {length} does not divide into groups of {nm.m}")
    return nm


def _has_kernel(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.layout == torch.strided


def _compiled(weight: Tensor, pattern: Pattern, axis: int, *, multiply: bool = False) -> tuple[Tensor, Tensor]:
    """(mask, weight) or, with ``multiply``, (nothing of use, masked weight): piece by piece, while a piece is in the cache."""
    from nm_compiler.solvers.masks_kernels import kernel

    weight = weight.detach()
    far_first = sorted(range(weight.ndim), key=weight.stride, reverse=True)  # the order in which they lie in memory
    ordered = weight.permute(far_first).contiguous()  # a copy only where there are gaps or overlaps
    back = [far_first.index(a) for a in range(weight.ndim)]
    result = torch.empty_like(ordered) if multiply else ordered
    if not weight.numel():
        return torch.empty(weight.shape, dtype=torch.bool), result.permute(back)
    inner = ordered.shape[far_first.index(axis % weight.ndim) + 1 :].numel()
    groups = ordered.view(-1, pattern.m, inner)
    step = max(1, _PIECE // (pattern.m * inner)) if multiply else len(groups)
    mask = torch.empty((min(step, len(groups)), pattern.m, inner), dtype=torch.bool)
    bits = _BITS[weight.dtype]
    keys, sign = _as_numpy(groups).view(bits), bits(2 ** (8 * bits().itemsize - 1) - 1)
    find, zero = kernel(pattern.n, pattern.m, single=inner == 1), ordered.new_zeros(())
    for start in range(0, len(groups), step):
        piece = slice(start, start + step)
        kept = mask[: len(groups[piece])]
        find(keys[piece], sign, kept.numpy().view(np.uint8))
        if multiply:
            torch.where(kept, groups[piece], zero, out=result.view(groups.shape)[piece])
    return mask if multiply else mask.view(ordered.shape).permute(back), result.permute(back)


def _as_numpy(tensor: Tensor) -> Array:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
