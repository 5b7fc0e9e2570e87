"""Importances as bytes: four numbers in the room and about the time of one, for a search that adds noise to its scores anyway.

Scores of placements are compared, never added to a result: among ``sum_r max(x_r, t_r)`` the sum of a channel's own values
makes no difference, and what its neighbours leave over, t, is seldom high. So the highest 1 of 1,000 values may count as
equal, and the rest has steps of some percent of the mean: over the rows of a weight, less than the noise at its lowest.
All sums are whole numbers: with and without the C kernels a search takes the same way.
"""

from __future__ import annotations

import numpy as np

from nm_compiler.solvers.search_members import Array
from nm_compiler.solvers.sweeps import max_sums

_HIGHEST, _ALIKE = 255, 1e-3
_SAMPLE = 1 << 18
_WHOLE = 64  # bytes: rows are filled up with zeros to whole vectors


def as_bytes(columns: Array) -> tuple[Array, float]:
    """uint8 ``[channels, rows]``, zeros added to the rows, of float32 ``[channels, rows]``, not all zero; how many steps
    make one of its units.
    """
    flat, draws = columns.reshape(-1), np.random.default_rng(0)
    sample = flat if flat.size <= _SAMPLE else flat[draws.integers(flat.size, size=_SAMPLE)]
    highest = float(np.quantile(sample, 1 - _ALIKE)) or float(columns.max())
    steps = _HIGHEST / highest
    coarse = np.zeros((len(columns), -(-columns.shape[1] // _WHOLE) * _WHOLE), dtype=np.uint8)
    for start in range(0, len(columns), 64):  # piece by piece, for the sake of memory
        part = columns[start : start + 64]
        coarse[start : start + 64, : columns.shape[1]] = np.rint(np.minimum(part * np.float32(steps), _HIGHEST))
    return coarse, steps


def weigh(slots: Array, coarse: Array, channels: Array, scores: Array) -> None:
    """``scores[i, j] = sum_r max(slots[i, r], coarse[channels[j], r])``, int64; by the C kernels where there are any."""
    from nm_compiler.solvers import neighbourhood_kernels

    if not max_sums(slots, coarse, channels, scores):
        neighbourhood_kernels.weigh(slots, coarse, channels, scores)
