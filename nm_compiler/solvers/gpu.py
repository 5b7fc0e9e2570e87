"""What training does with masks and live sets on a GPU, each one Triton kernel: as `nm_compiler.solvers.sweeps` on the CPU.

Every function says whether it did the work: False or None off CUDA, without triton, for fake tensors, for other dtypes than
floats of 2, 4 and 8 bytes, for weights with gaps, and where `sweeps` has no way to see a weight either. The callers have torch
operations for those; all agree to the bit, in Triton's interpreter and on an H200.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nm_compiler.solvers import masks
from nm_compiler.solvers.sweeps import has_no_gaps, lying

_TYPES = (Tensor, torch.nn.Parameter)


def cover(live: Tensor, table: Tensor, mask: Tensor) -> bool:
    """Write the union of live combinations to bool rows, see `sweeps.lying`. live: packed; table: from `byte_table`."""
    if table.ndim != 3 or not _take(live, table, mask):
        return False
    at = lying(mask, table.shape[-1])
    if at is None:
        return False
    with torch.cuda.device_of(mask):
        _live().cover(live.contiguous(), table.contiguous(), at, mask)
    return True


def covered(weight: Tensor, live: Tensor, table: Tensor, out: Tensor, axes: Sequence[int] = ()) -> bool:
    """Write W where a live combination covers it, else 0; rows, or weights and their axes, that lie alike."""
    if table.ndim != 3 or not _take(weight, live, table, out) or not _is_float(weight) or weight.stride() != out.stride():
        return False
    at = lying(weight, table.shape[-1], axes)
    if at is None:
        return False
    with torch.cuda.device_of(weight):
        _live().covered(weight.detach(), live.contiguous(), table.contiguous(), at, out)
    return True


def gradients(
    grad: Tensor, weight: Tensor, live: Tensor, table: Tensor, results: tuple[Tensor, Tensor], axes: Sequence[int] = ()
) -> bool:
    """Write dW = g where a live combination covers it and dS = W * dW, the latter zero where a group is decided.

    Rows, or weights and their axes, see `sweeps.lying`; the weight and both results lie alike.
    """
    tensors = (weight, grad, *results)
    if table.ndim != 3 or not _take(*tensors, live, table) or not _is_float(weight):
        return False
    alike = all(tensor.dtype == weight.dtype for tensor in tensors) and all(r.stride() == weight.stride() for r in results)
    at = lying(weight, table.shape[-1], axes) if alike else None
    if at is None:
        return False
    with torch.cuda.device_of(weight):
        own, given = weight.detach(), _lying_as(weight, grad)
        _live().gradients(given, own, live.contiguous(), table.contiguous(), at, results)
    return True


def keep(values: Tensor, mask: Tensor) -> Tensor | None:
    """``values`` where ``mask``, else 0, in the strides of ``values``."""
    if not _take(values, mask) or not _is_float(values) or not has_no_gaps(values) or not values.numel():
        return None
    out = torch.empty_like(values)
    with torch.cuda.device_of(values):
        _select().keep(values.detach(), _lying_as(values, mask), out)
    return out


def decay(grad: Tensor, weight: Tensor, masked: Tensor, amount: float) -> Tensor | None:
    """``(weight - masked) * amount + grad``, in the strides of the weight."""
    tensors = (weight, grad, masked)
    if not _take(*tensors) or not _is_float(weight) or not has_no_gaps(weight) or not weight.numel():
        return None
    if any(tensor.dtype != weight.dtype or tensor.shape != weight.shape for tensor in tensors):
        return None
    out = torch.empty_like(weight)
    with torch.cuda.device_of(weight):
        _select().decay(_lying_as(weight, grad), weight.detach(), _lying_as(weight, masked), amount, out)
    return out


def largest_rows(weight: Tensor, order: Tensor, n: int, m: int, out: Tensor) -> bool:
    """Write the weight under the mask of the ``n`` largest of ``m`` rows as they follow in ``order``; rows stay in place.

    weight, out: rows ``[*batch, out, ..]`` that lie alike, experts one after the other; order: int64 ``[*batch, out]``.
    """
    if not _take(weight, order, out) or not _is_float(weight) or weight.dtype != out.dtype or weight.stride() != out.stride():
        return False
    batch, shape, strides = order.ndim - 1, weight.shape, weight.stride()
    apart = all(shape[axis] == 1 or strides[axis] == math.prod(shape[axis + 1 :]) for axis in range(batch))
    if not apart or not weight.numel() or not has_no_gaps(weight) or order.dtype != torch.int64 or order.shape[-1] % m:
        return False
    if order.shape != shape[: batch + 1]:
        return False
    with torch.cuda.device_of(weight):
        _rows().largest_rows(weight.detach(), order.contiguous(), n, m, strides[batch], out)
    return True


def _take(*tensors: Tensor) -> bool:
    """Whether all have an address on one GPU: no fake tensors, no subclasses."""
    if not masks.on_gpu(tensors[0]):
        return False
    device = tensors[0].device
    for tensor in tensors:  # in every step, for every weight: a generator costs as much again
        if type(tensor) not in _TYPES or tensor.device != device or tensor.layout != torch.strided:
            return False
    return True


def _is_float(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() in (2, 4, 8)


def _lying_as(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the strides of another one of its shape: itself, or a copy."""
    if tensor.stride() == like.stride():
        return tensor.detach()
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor.detach())


def _live() -> Any:
    import nm_compiler.solvers.live_triton as kernels

    return kernels


def _select() -> Any:
    import nm_compiler.solvers.select_triton as kernels

    return kernels


def _rows() -> Any:
    import nm_compiler.solvers.rows_triton as kernels

    return kernels
