"""A weight under a mask, in one pass over memory: `keep` for any tensor, compiled for what lies on the CPU or a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from nm_compiler.solvers import gpu, sweeps
from nm_compiler.solvers.search_members import Array
from nm_compiler.solvers.threads import in_threads

_SMALL = 1 << 15  # below, torch is done before a kernel is found
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask``, else 0, in the strides of ``values``. mask: bool of its shape, in any strides."""
    done = gpu.keep(values, mask)
    if done is not None:
        return done
    flat = flattened(values, mask) if values.is_floating_point() else None
    if flat is None:
        return where(values, mask)
    out = torch.empty_like(values)
    if sweeps.keep(values, mask, out):
        return out
    from nm_compiler.solvers.select_kernels import select

    bits = _BITS[values.dtype.itemsize]
    order = sorted(range(values.ndim), key=values.stride, reverse=True)
    arrays = [flat[0].view(bits).numpy(), flat[1].view(torch.uint8).numpy(), out.permute(order).view(-1).view(bits).numpy()]
    in_threads(lambda part: select(*(array[part] for array in arrays)), len(arrays[0]), values.numel())
    return out


def where(values: Tensor, mask: Tensor) -> Tensor:
    """As `keep`, by torch operations, which can be differentiated."""
    kept: Tensor = torch.where(mask, values, values.new_zeros(()))
    return kept if kept.stride() == values.stride() else torch.empty_like(values).copy_(kept)


def decayed(grad: Tensor, weight: Tensor, masked: Tensor, decay: float) -> Tensor:
    """``grad + decay * (weight - masked)``: SR-STE's pull of the pruned weights to zero. All of one shape and dtype.

    Its own gradient, which gradients of gradients have, is ``decay`` times that of the pruned weights.
    """
    if torch.is_grad_enabled():  # the kernels cannot be differentiated, and the gradient of masked goes straight through
        return where(weight, masked.detach() != weight.detach()).mul(decay).add(grad)
    for kernels in (gpu, sweeps):
        done: Tensor | None = kernels.decay(grad, weight, masked, decay)
        if done is not None:
            return done
    # not add(alpha=): inductor (torch 2.13) drops alpha where it fuses the addition into the product before it
    return (weight - masked).mul_(decay).add(grad)  # not in place: under torch.func.vmap grad may have an axis more


def flattened(*tensors: Tensor) -> list[Tensor] | None:
    """One-dimensional views in the order of memory, if all lie alike there, without gaps, on the CPU; else None."""
    first = tensors[0]
    alike = all(t.stride() == first.stride() and t.shape == first.shape for t in tensors)
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
    if not alike or not plain or first.numel() < _SMALL or first.layout != torch.strided:
        return None
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    if not first.permute(order).is_contiguous():
        return None
    return [t.detach().permute(order).view(-1) for t in tensors]


def as_arrays(tensors: list[Tensor]) -> list[Array]:
    """For kernels: bool becomes uint8."""
    return [(t.view(torch.uint8) if t.dtype == torch.bool else t).numpy() for t in tensors]
