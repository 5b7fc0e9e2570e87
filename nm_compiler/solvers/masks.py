"""Magnitude masks as fast as memory allows: the N largest of every M along any axis.

On the CPU a kernel in C, or where there is none one compiled by numba (the first call for a pattern takes about a second,
kept on disk), on CUDA a Triton kernel where triton is installed; else the torch operations of
`nm_compiler.solvers.magnitude`. All agree to the bit.
Ref for the comparison: benchmarks/solvers.py.
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern, PatternLike
from nm_compiler.solvers import sweeps
from nm_compiler.solvers.combinations import pack
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.search_members import Array
from nm_compiler.solvers.threads import in_threads

_BITS: dict[torch.dtype, type[np.unsignedinteger[Any]]] = {
    torch.float16: np.uint16, torch.bfloat16: np.uint16, torch.float32: np.uint32, torch.float64: np.uint64
}  # fmt: skip
_SMALL = 1 << 15  # weights below are masked by torch in less time than a compiled kernel takes to load


def top_mask(
    weight: Tensor,
    *,
    pattern: PatternLike,
    axis: int = -1,
    form: Literal["bool", "uint8", "bits"] = "bool",
    out: Tensor | None = None,
) -> Tensor:
    """1 where a weight is among the N largest magnitudes of its M along ``axis``; the lower index wins among equals.

    weight: float16, bfloat16, float32 or float64, any strides and device. NaN counts as the largest of all, so that it
    stays where it is seen. Exactly N ones in every group.
    Returns bool or uint8 of the weight's shape and strides, or ``"bits"``: uint8 ``[.., ceil(last / 8)]``, the mask's last
    axis packed, bit ``k % 8`` of byte ``k // 8``. out: a contiguous tensor of that shape and dtype to write to and return;
    fresh memory costs more than the mask. Raises NMError if M does not divide the axis, and for another dtype or ``out``.
    """
    nm = _checked(weight, pattern, axis)
    if form not in ("bool", "uint8", "bits"):
        raise NMError(f"form={form!r}: choose 'bool', 'uint8' or 'bits'")
    if form == "bits":
        packed = _bits(weight, nm, axis)
        return packed if out is None else _checked_out(out, packed.shape, torch.uint8, weight).copy_(packed)
    dtype = torch.uint8 if form == "uint8" else torch.bool
    if out is not None:
        _checked_out(out, weight.shape, dtype, weight)
    if _has_kernel(weight):
        return _compiled(weight, nm, axis, torch.empty_like(weight, dtype=dtype) if out is None else out)
    mask = _triton().mask(weight.detach(), nm.n, nm.m, axis) if on_gpu(weight) else magnitude_mask(weight, nm.n, nm.m, axis)
    mask = mask.view(dtype)
    return mask if out is None else out.copy_(mask)


def masked(weight: Tensor, *, pattern: PatternLike, axis: int = -1, out: Tensor | None = None) -> Tensor:
    """``weight * top_mask(weight)`` in one pass over memory, of the weight's shape and strides, no gradient.

    out and errors as in `top_mask`.
    """
    nm = _checked(weight, pattern, axis)
    weight = weight.detach()
    if out is not None:
        _checked_out(out, weight.shape, weight.dtype, weight)
    if _has_kernel(weight):
        return _compiled(weight, nm, axis, torch.empty_like(weight) if out is None else out)
    kept = _triton().masked(weight, nm.n, nm.m, axis) if on_gpu(weight) else _plain(weight, nm.n, nm.m, axis)
    return kept if out is None else out.copy_(kept)


def keep_largest(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """As `masked`, for ops that run in every step: of any dtype and without checks, a small weight in C or by plain torch.

    weight: ``size(axis)`` a multiple of ``m``.
    """
    if weight.dtype not in _BITS:
        return _plain(weight.detach(), n, m, axis)
    if weight.device.type == "cpu" and weight.numel() < _SMALL:
        out = torch.empty_like(weight)
        return out if sweeps.largest(weight, Pattern(n, m), axis, out) else _plain(weight.detach(), n, m, axis)
    if on_gpu(weight):
        kept: Tensor = _triton().masked(weight, n, m, axis)
        return kept
    return masked(weight, pattern=Pattern(n, m), axis=axis)


def _plain(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    return torch.where(magnitude_mask(weight, n, m, axis), weight, weight.new_zeros(()))


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


def _checked_out(out: Tensor, shape: torch.Size, dtype: torch.dtype, weight: Tensor) -> Tensor:
    fits = out.shape == shape and out.dtype == dtype and out.device == weight.device and out.is_contiguous()
    if not fits or out.requires_grad:
        raise NMError(
            f"out= of shape {list(out.shape)}, {out.dtype} on {out.device}: needs a contiguous {dtype} of shape {list(shape)} "
            f"on {weight.device}, without a gradient"
        )
    return out


def _bits(weight: Tensor, pattern: Pattern, axis: int) -> Tensor:
    if _has_kernel(weight):
        mask = _compiled(weight, pattern, axis, torch.empty_like(weight, dtype=torch.bool))
        return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    if on_gpu(weight):
        return _triton().bits(weight.detach(), pattern.n, pattern.m, axis)  # type: ignore[no-any-return]
    return pack(magnitude_mask(weight, pattern.n, pattern.m, axis))


def _has_kernel(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.layout == torch.strided


def on_gpu(weight: Tensor) -> bool:
    """Whether a Triton kernel can take it: strided, on a CUDA device, and triton is installed."""
    return weight.is_cuda and weight.layout == torch.strided and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton() -> Any:
    import nm_compiler.solvers.masks_triton as masks_triton

    return masks_triton


def _compiled(weight: Tensor, pattern: Pattern, axis: int, result: Tensor) -> Tensor:
    """Write the mask (of one byte) or the masked weight (of the weight's dtype) to ``result``, which has no gaps."""
    if not weight.numel() or sweeps.largest(weight, pattern, axis, result):
        return result
    from nm_compiler.solvers.masks_kernels import kernel

    values = result.dtype == weight.dtype
    in_memory = sorted(range(weight.ndim), key=result.stride, reverse=True)
    ordered = weight.detach().permute(in_memory).contiguous()  # a copy only where memory is in another order
    inner = ordered.shape[in_memory.index(axis % weight.ndim) + 1 :].numel()
    bits = _BITS[weight.dtype]
    keys = _as_numpy(ordered.view(-1, pattern.m, inner)).view(bits)
    out = _as_numpy(result.permute(in_memory).view(-1, pattern.m, inner)).view(bits if values else np.uint8)
    find = kernel(pattern.n, pattern.m, inner=inner, values=values)
    in_threads(partial(_part, find, keys, bits(2 ** (8 * bits().itemsize - 1) - 1), out), len(keys), weight.numel())
    return result


def _part(find: Any, keys: Array, sign: Any, out: Array, part: slice) -> None:
    find(keys[part], sign, out[part])


def _as_numpy(tensor: Tensor) -> Array:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
