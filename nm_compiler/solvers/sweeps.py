"""Masks, live sets and their gradients by the C kernels of `nm_compiler.runtime.native`, each one pass over memory.

Every function says whether it did the work: False or None where there are no kernels, for other devices, dtypes and layouts,
for M beyond 32 and where numba is faster. The callers have numba and torch for those; all agree to the bit, but for retirement
of combinations whose scores differ by less than their sums round.

    [outer, groups, M, inner]     a weight in the order of memory: the M of a group are ``inner`` numbers apart
    [outer, inner, groups, ..]    live sets
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nm_compiler.pattern import Pattern, combination_table
from nm_compiler.runtime.native import sweep
from nm_compiler.runtime.native.library import Library, load
from nm_compiler.runtime.native.sweep import Sweep

Array = np.ndarray[Any, np.dtype[Any]]

_REAL = (torch.float32, torch.float64)
_TYPES = (Tensor, torch.nn.Parameter)


class Lying(NamedTuple):
    """How a weight lies."""

    outer: int
    groups: int
    inner: int


def kernels() -> Library | None:
    """Those of this processor, if there are any."""
    found = load()
    return found if isinstance(found, Library) else None


def is_plain(*tensors: Tensor) -> bool:
    """Whether all have an address on the CPU: no fake tensors, no subclasses."""
    return not any(type(t) not in _TYPES or not t.is_cpu or t.layout != torch.strided for t in tensors)


def has_no_gaps(tensor: Tensor) -> bool:
    """Whether its numbers fill memory, in whatever order of the axes."""
    return _has_no_gaps(tuple(tensor.shape), tensor.stride())


@lru_cache
def _has_no_gaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for stride, size in sorted(axis for axis in zip(strides, shape, strict=True) if axis[1] != 1):
        if stride != step:
            return False
        step *= size
    return True


def lying(rows: Tensor, m: int, axes: Sequence[int] = ()) -> Lying | None:
    """Of a weight seen as ``[*batch, out, *taps, in]``; None where it has gaps, or other axes than the last are exchanged.

    axes: those axes of a weight that is not seen so yet, which spares the view.
    """
    return _lying_along(rows.shape, rows.stride(), m, tuple(axes)) if axes else _lying(tuple(rows.shape), rows.stride(), m)


@lru_cache
def _lying_along(shape: tuple[int, ...], strides: tuple[int, ...], m: int, axes: tuple[int, ...]) -> Lying | None:
    return _lying(tuple(shape[axis] for axis in axes), tuple(strides[axis] for axis in axes), m)


@lru_cache  # asked in every step
def _lying(shape: tuple[int, ...], strides: tuple[int, ...], m: int) -> Lying | None:
    last = len(shape) - 1
    there = [axis for axis, size in enumerate(shape) if size != 1 or axis == last]
    in_memory = sorted(there, key=lambda axis: strides[axis] if shape[axis] != 1 else 0, reverse=True)
    others = [axis for axis in in_memory if axis != last]
    numel = math.prod(shape)
    if not numel or not _has_no_gaps(shape, strides) or others != sorted(others) or shape[last] % m or m > sweep.WIDEST:
        return None
    inner = math.prod(shape[axis] for axis in in_memory[in_memory.index(last) + 1 :])
    groups = shape[last] // m
    return Lying(numel // (groups * m * inner), groups, inner)


def keep(values: Tensor, mask: Tensor, out: Tensor) -> bool:
    """``out = values where mask else 0``, all lying alike without gaps. mask: bool."""
    found = kernels()
    if found is None or values.element_size() not in (2, 4, 8):
        return False
    _run(found, sweep.KEEP, values, {"weight": values, "mask": mask, "out": out}, {"outer": values.numel()})
    return True


def decay(grad: Tensor, weight: Tensor, masked: Tensor, amount: float) -> Tensor | None:
    """``(weight - masked) * amount + grad``, in the strides of the weight."""
    found, tensors = kernels(), (grad, weight, masked)
    if found is None or not is_plain(*tensors) or weight.dtype not in _REAL or not _alike(*tensors) or not has_no_gaps(weight):
        return None
    out = torch.empty_like(weight)
    operands = {"weight": weight, "grad": grad, "masked": masked, "out": out}
    _run(found, sweep.DECAY, weight, operands, {"outer": weight.numel()}, amount)
    return out


def gradients(
    grad: Tensor, weight: Tensor, live: Tensor, table: Tensor, results: tuple[Tensor, Tensor], axes: Sequence[int] = ()
) -> bool:
    """Write dW = g where a live combination covers it and dS = W * dW, the latter zero where a group is decided.

    grad, weight, results: ``[*batch, out, *taps, in]``, or in any order of axes with ``axes`` as in `lying`; of one dtype;
    live: packed; table: from `byte_table`. Returns False, nothing written, where there is no kernel for it.
    """
    found, tensors = kernels(), (weight, grad, *results)
    if found is None or weight.dtype not in _REAL or not _alike(*tensors):
        return False
    operands = {"weight": weight, "grad": grad, "live": live, "table": table, "out": results[0], "second": results[1]}
    return _by_live(found, sweep.GRADIENTS, weight, operands, axes)


def covered(weight: Tensor, live: Tensor, table: Tensor, out: Tensor, axes: Sequence[int] = ()) -> bool:
    """Write W where a live combination covers it, else 0. Arguments as in `gradients`; numbers of 2, 4 or 8 bytes.

    Returns False, nothing written, where there is no kernel for it.
    """
    found = kernels()
    if found is None or weight.element_size() not in (2, 4, 8) or not _alike(weight, out):
        return False
    return _by_live(found, sweep.COVERED, weight, {"weight": weight, "live": live, "table": table, "out": out}, axes)


def cover(live: Tensor, table: Tensor, mask: Tensor) -> bool:
    """Write the union of live combinations to bool rows as in `lying`. live: packed; table: from `byte_table`."""
    found = kernels()
    return found is not None and _by_live(found, sweep.COVER, mask, {"live": live, "table": table, "out": mask})


def _by_live(found: Library, kind: int, like: Tensor, operands: Mapping[str, Tensor], axes: Sequence[int] = ()) -> bool:
    live, table = operands["live"], operands["table"]
    if table.ndim != 3 or not is_plain(*operands.values()) or not live.is_contiguous() or not table.is_contiguous():
        return False
    m = table.shape[-1]
    at = lying(like, m, axes)
    if at is None:
        return False
    _run(found, kind, like, operands, {**at._asdict(), "m": m, "bytes": live.shape[-1]})
    return True


def retire(scores: Tensor, live: Tensor, pattern: Pattern, left: int) -> Tensor | None:
    """The live sets with the ``left`` best combinations of every group; scores: rows as in `lying`."""
    found = kernels()
    if found is None or not is_plain(scores, live) or scores.dtype not in _REAL or not pattern.has_table:
        return None
    at = lying(scores, pattern.m) if live.is_contiguous() else None
    if at is None:
        return None
    kept = torch.empty_like(live)
    operands = {"weight": scores, "live": live, "table": _members(pattern), "out": kept}
    sizes = {"n": pattern.n, "m": pattern.m, "bytes": live.shape[-1], "combinations": pattern.combinations, "keep": left}
    _run(found, sweep.RETIRE, scores, operands, {**at._asdict(), **sizes})
    return kept


def largest(weight: Tensor, pattern: Pattern, axis: int, out: Tensor) -> bool:
    """Write the mask (to one byte a weight) or the masked weight (to the weight's dtype); both lie alike, without gaps."""
    found = kernels()
    if found is None or not is_plain(weight, out) or weight.stride() != out.stride() or not has_no_gaps(weight):
        return False
    if weight.element_size() not in (2, 4, 8) or pattern.m > sweep.WIDEST or not weight.numel():
        return False
    step = weight.stride(axis)
    inner = math.prod(size for size, stride in zip(weight.shape, weight.stride(), strict=True) if size != 1 and stride < step)
    if inner == 1 and pattern.m in (3, 5, 6, 7):  # numba's way with them is faster
        return False
    sizes = {"groups": weight.numel() // (pattern.m * inner), "inner": inner, "n": pattern.n, "m": pattern.m}
    kind = sweep.LARGEST if out.dtype == weight.dtype else sweep.MASK
    _run(found, kind, weight, {"weight": weight, "out": out}, sizes)
    return True


def largest_rows(weight: Tensor, order: Tensor, pattern: Pattern, out: Tensor) -> bool:
    """Write the masked weight, groups being M rows of axis 0 as they follow in ``order``, int64; rows stay where they are."""
    found, item, inner = kernels(), weight.element_size(), weight[:1].numel()
    if found is None or not is_plain(weight, order, out) or weight.dtype != out.dtype or pattern.m > sweep.WIDEST:
        return False
    lie = weight.is_contiguous() and out.is_contiguous() and order.is_contiguous() and order.dtype == torch.int64
    if not lie or item not in (2, 4, 8) or inner * item < sweep.VECTOR or len(order) != len(weight):
        return False
    if not 0 <= int(order.min()) <= int(order.max()) < len(weight):
        return False
    sizes = {"groups": len(weight) // pattern.m, "inner": inner, "n": pattern.n, "m": pattern.m}
    _run(found, sweep.LARGEST, weight, {"weight": weight, "order": order, "out": out}, sizes)
    return True


def max_sums(slots: Array, columns: Array, channels: Array, out: Array) -> bool:
    """Write ``out[i, j] = sum_r max(slots[i, r], columns[channels[j], r])``; on one thread, as a search is.

    slots, columns: uint8 ``[.., rows]`` without gaps, rows a multiple of 64; channels: int64, of columns that are there;
    out: int64 ``[len(slots), len(channels)]``.
    """
    found = kernels()
    if found is None or found.isa == "portable":
        return False
    operands = {"weight": slots, "grad": columns, "order": channels, "out": out}
    sizes = {"outer": len(slots), "n": len(channels), "inner": slots.shape[1]}
    addresses = {name: array.ctypes.data for name, array in operands.items()}
    found.sweep(Sweep(sweep.MAX_SUMS, 1, **addresses, **sizes), 0)
    return True


def _run(
    found: Library, kind: int, like: Tensor, operands: Mapping[str, Tensor], sizes: Mapping[str, int], amount: float = 0.0
) -> None:
    addresses = {name: tensor.data_ptr() for name, tensor in operands.items()}
    found.sweep(Sweep(kind, like.element_size(), **addresses, **sizes, decay=amount), like.numel())


def _alike(first: Tensor, *others: Tensor) -> bool:
    return all(t.dtype == first.dtype and t.shape == first.shape and t.stride() == first.stride() for t in others)


@cache
def _members(pattern: Pattern) -> Tensor:
    table = combination_table(pattern)
    return table.nonzero()[:, 1].view(len(table), pattern.n).to(torch.uint8)
