"""What LBC does with packed live sets in every step, by kernels: Triton's on a GPU, in C or compiled ones on the CPU.

The callers have torch operations for everything else: other devices, dtypes and layouts, small weights, graphs of fake
tensors. Both agree, but where scores of combinations differ by less than their sums round.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nm_compiler.pattern import Pattern, combination_table
from nm_compiler.solvers import gpu, sweeps
from nm_compiler.solvers.search_members import Array
from nm_compiler.solvers.select import as_arrays, flattened
from nm_compiler.solvers.threads import in_threads

_SMALL = 1 << 15  # weights below are done by torch in less time than a kernel takes to load
_SIZES = (1, 2, 4, 8, 16, 24, 32)
_TYPES = (torch.float32, torch.float64, torch.bool)


def cover(live: Tensor, table: Tensor, mask: Tensor) -> bool:
    """Write the union of live combinations to ``mask``, bool rows ``[*batch, out, *taps, in]``. Returns whether it did.

    live: uint8 ``[*batch, out, groups per row, ceil(C / 8)]``; table: from `byte_table`.
    """
    if gpu.cover(live, table, mask) or sweeps.cover(live, table, mask):
        return True
    m = table.shape[-1]
    target = _parts(mask, live, m)
    if target is None or table.ndim != 3 or m not in _SIZES:
        return False
    from nm_compiler.solvers import live_kernels

    size = min(m, 8)  # positions in a machine word; a group has one word or several
    word: Any = live_kernels.WORDS[size]
    sets, words = _sets(live, target), table.contiguous().numpy().view(word).reshape(len(table), 256, -1)
    full = word(0x0101010101010101 & (2 ** (8 * size) - 1))
    whole = target.strides[3] == 1 and not any(step % size for step in target.strides[:3]) and not target.ctypes.data % size
    for part in range(m // size):
        positions, unions = target[..., part * size : (part + 1) * size], np.ascontiguousarray(words[..., part])
        if whole:
            places = np.lib.stride_tricks.as_strided(positions.view(word)[..., 0], target.shape[:3], target.strides[:3])
            _run(live_kernels.cover_words, (sets,), (unions, full), places)
        else:
            _run(live_kernels.cover_bytes(size), (sets,), (unions, np.uint64(full)), positions)
    return True


def gradients(grad: Tensor, weight: Tensor, live: Tensor, table: Tensor, results: tuple[Tensor, Tensor]) -> bool:
    """Write dW = g where a live combination covers it and dS = W * dW to ``results``. Returns whether it did.

    All rows ``[*batch, out, *taps, in]``; live, table: as in `cover`.
    """
    if any(kernels.gradients(grad, weight, live, table, results) for kernels in (gpu, sweeps)):
        return True
    m, mask = table.shape[-1], torch.empty_like(weight, dtype=torch.bool)
    tensors = (grad, weight, mask, *results)
    parts = [_parts(tensor, live, m) for tensor in tensors]
    if any(part is None for part in parts) or m > 16 or grad.dtype != weight.dtype or not cover(live, table, mask):
        return False
    from nm_compiler.solvers import live_kernels
    from nm_compiler.solvers.select_kernels import both_gradients

    flat = flattened(*tensors)
    if flat is not None and not live_kernels.any_decided(live.detach().view(-1, live.shape[-1]).numpy()):
        arrays = as_arrays(flat)
        in_threads(lambda part: both_gradients(*(array[part] for array in arrays)), len(arrays[0]), len(arrays[0]))
        return True
    first = parts[0]
    assert first is not None
    _run(live_kernels.gradients(m), (*parts[:3], _sets(live, first), *parts[3:]), ())
    return True


def retire(scores: Tensor, live: Tensor, pattern: Pattern, keep: int) -> Tensor | None:
    """The live sets with the ``keep`` best combinations left; scores: by position, rows ``[*batch, out, *taps, in]``."""
    done = sweeps.retire(scores, live, pattern, keep)
    if done is not None:
        return done
    parts, kept = _parts(scores, live, pattern.m), torch.empty_like(live)
    if parts is None:
        return None
    from nm_compiler.solvers import live_kernels

    _run(live_kernels.retiring(pattern.n), (parts, _sets(live, parts)), (_members(pattern), keep), _sets(kept, parts))
    return kept


def _run(kernel: Any, split: tuple[Any, ...], whole: tuple[Any, ...], *last: Array) -> None:
    """Call ``kernel(*split, *whole, *last)``, arrays of ``split`` and ``last`` by output rows."""

    def part(rows: slice) -> None:
        kernel(*(array[rows] for array in split), *whole, *(array[rows] for array in last))

    in_threads(part, len(split[0]), split[0].size)


def _parts(rows: Tensor, live: Tensor, m: int) -> Array | None:
    """Rows as ``[out, taps, groups, M]``, without a copy, experts before their outputs; None where no kernel reads that."""
    plain = type(rows) in (Tensor, torch.nn.Parameter) and type(live) in (Tensor, torch.nn.Parameter)
    if not plain or rows.device.type != "cpu" or rows.dtype not in _TYPES or rows.numel() < _SMALL or not live.is_contiguous():
        return None
    leading = math.prod(live.shape[:-2])
    try:
        viewed = rows.detach().view(leading, -1, rows.shape[-1] // m, m)
    except RuntimeError:  # axes that do not lie so that they merge
        return None
    found: Array = (viewed.view(torch.uint8) if viewed.dtype == torch.bool else viewed).numpy()
    return found


def _sets(live: Tensor, parts: Array) -> Array:
    found: Array = live.detach().view(*parts.shape[:3], -1).numpy()
    return found


@cache
def _members(pattern: Pattern) -> Array:
    table = combination_table(pattern)
    found: Array = table.nonzero()[:, 1].view(len(table), pattern.n).numpy()
    return found
