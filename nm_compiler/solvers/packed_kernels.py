"""The sums of the order search for importances that are all zero or one: 64 rows in a word.

Among zeros and ones a maximum is an OR and a sum is a count of bits, so the (max, +) sums of `search_kernels`, which call
these where ``columns`` is uint64, take a fraction of the time. Everywhere: ``columns`` uint64 ``[channels, words]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from nm_compiler.solvers.jit import jit

Array = np.ndarray[Any, np.dtype[Any]]


def _popcount(context: Any, word: Any) -> Any:
    """Bits that are set in a uint64: one instruction, which a loop over words uses many at a time."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), code


popcount: Any = intrinsic(_popcount)


@jit
def thresholds(columns: Array, members: Array, n: int, out: Array) -> None:
    """For each of the M channels ``members`` of a group: 1 where ``n`` or more of the other M - 1 are. out: ``[M, words]``."""
    m = members.shape[0]
    levels = np.empty(n + 1, dtype=np.uint64)
    for w in range(columns.shape[1]):
        for j in range(m):
            levels[:] = 0
            levels[0] = ~np.uint64(0)
            for k in range(m):
                if k != j:
                    _add(levels, columns[members[k], w], n)
            out[j, w] = levels[n]


@jit
def _add(levels: Array, word: Any, n: int) -> None:
    """Count one more channel in: bit b of ``levels[k]`` says that k or more had bit b."""
    for k in range(n, 0, -1):
        levels[k] |= levels[k - 1] & word


@jit
def max_sums(slots: Array, chosen: Array, columns: Array, channels: Array, out: Array) -> None:
    """``out[i, j]``: bits in ``slots[chosen[i]] | columns[channels[j]]``."""
    words = slots.shape[1]
    for i in range(chosen.shape[0]):
        slot = slots[chosen[i]]
        for j in range(channels.shape[0]):
            column = columns[channels[j]]
            count = np.uint64(0)
            for w in range(words):
                count += popcount(slot[w] | column[w])
            out[i, j] = np.float32(count)


@jit
def kept_sum(columns: Array, order: Array, n: int, m: int) -> float:
    """How many ones N:M keeps of all groups under an order."""
    levels = np.empty(n + 1, dtype=np.uint64)
    total = np.uint64(0)
    for first in range(0, order.shape[0], m):
        for w in range(columns.shape[1]):
            levels[:] = 0
            levels[0] = ~np.uint64(0)
            for j in range(first, first + m):
                _add(levels, columns[order[j], w], n)
            for k in range(1, n + 1):
                total += popcount(levels[k])
    return np.float64(total)
