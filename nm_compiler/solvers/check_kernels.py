"""Compiled count of the non-zeros of a group. Kernels take ``keys`` uint ``[groups, M, inner]``: the bits of the weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array


@jit
def most_nonzeros(keys: Array, sign: Any) -> int:
    """The largest number of non-zeros in a group. sign: all bits but the sign bit."""
    groups, m, inner = keys.shape
    worst = np.uint8(0)
    if inner == 1:
        flat = keys.reshape(-1)
        for g in range(groups):
            count = np.uint8(0)
            for j in range(m):
                count += np.uint8((flat[g * m + j] & sign) != 0)
            worst = max(worst, count)
        return int(worst)
    counts = np.zeros(inner, np.uint8)
    for g in range(groups):
        counts[:] = 0
        for j in range(m):
            row = keys[g, j]
            for k in range(inner):
                counts[k] += np.uint8((row[k] & sign) != 0)
        for k in range(inner):
            worst = max(worst, counts[k])
    return int(worst)
