"""Compiled counts of non-zeros. The bits of a weight come as unsigned numbers; ``sign``: all bits but the sign bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array

_LANES = 4096


@jit
def nonzeros(keys: Array, sign: Any) -> int:
    """How many of ``keys [weights]`` are not zero."""
    total = 0
    for start in range(0, keys.size, _LANES):
        count = np.uint32(0)
        for key in keys[start : start + _LANES]:
            count += np.uint32((key & sign) != 0)
        total += int(count)
    return total


@cache
def most_nonzeros(m: int) -> Callable[[Array, Any], int]:
    """A kernel for ``keys [groups, m, inner]``: the largest number of non-zeros in a group."""

    @jit
    def most(keys: Array, sign: Any) -> int:
        inner, worst = keys.shape[2], np.uint8(0)
        if inner == 1:
            flat = keys.reshape(-1)
            for g in range(keys.shape[0]):
                count = np.uint8(0)
                for j in range(m):
                    count += np.uint8((flat[g * m + j] & sign) != 0)
                worst = count if count > worst else worst
            return int(worst)
        counts = np.zeros(inner, np.uint8)
        for g in range(keys.shape[0]):
            counts[:] = 0
            for j in range(m):
                row = keys[g, j]
                for k in range(inner):
                    counts[k] += np.uint8((row[k] & sign) != 0)
            for k in range(inner):
                worst = counts[k] if counts[k] > worst else worst
        return int(worst)

    return most
