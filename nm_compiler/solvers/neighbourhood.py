"""Search by a large neighbourhood: many slots refilled at once, optimally. The better way from some hundred channels on."""

from __future__ import annotations

import numpy as np

from nm_compiler.pattern import Pattern
from nm_compiler.solvers.search_matrix import noise_unit
from nm_compiler.solvers.search_members import Array

LOUD, QUIET = 0.035, 0.007  # noise on the scores at the start and the end, in units of `noise_unit`; found by trial
AT_ONCE = 256  # slots refilled in one round: the assignment's cost grows with the cube
_SILENT = 0.97  # share of the budget after which there is no noise at all


class Neighbourhood:
    """A search that is under way; ``best`` and ``gained`` are its result at any time.

    Every round takes a random slot out of up to ``at_once`` random groups, weighs all their channels in all those slots, adds
    noise that fades, and refills them by linear assignment. columns: float32 ``[channels, rows]``, or packed.
    """

    def __init__(self, columns: Array, start: Array, pattern: Pattern, seed: int, at_once: int = AT_ONCE) -> None:
        self.best, self.gained = start.copy(), 0.0
        self._columns, self._pattern = columns, pattern
        self._order, self._value = start.copy(), 0.0
        self._unit = noise_unit(columns)
        self._state = np.array([seed], dtype=np.uint64)
        self._groups = np.arange(len(start) // pattern.m)
        count = min(at_once, len(self._groups))
        self._scores = np.empty((count, count), dtype=np.float32)

    def step(self, share: float, moves: int) -> int:
        """Go on for about ``moves`` placements, at least a round. Returns how many it took."""
        from nm_compiler.solvers.neighbourhood_kernels import rebuild

        n, m = self._pattern.n, self._pattern.m
        noise = self._unit * LOUD * (QUIET / LOUD) ** share if share < _SILENT else 0.0
        count, spent = len(self._scores), 0
        while spent == 0 or spent + count**2 <= moves:
            self._value += rebuild(self._columns, self._order, n, m, self._groups, self._state, count, noise, self._scores)
            spent += count**2
            if self._value > self.gained:
                self.gained = float(self._value)
                self.best[:] = self._order
        return spent
