"""Search by annealed swaps of two channels: the best way known up to a few hundred channels."""

from __future__ import annotations

import numpy as np

from nm_compiler.pattern import Pattern
from nm_compiler.solvers.search_matrix import noise_unit
from nm_compiler.solvers.search_members import Array

HOT, COLD = 0.09, 0.016  # temperatures at the start and the end, in units of `noise_unit`; found by trial


class Annealing:
    """A search that is under way; ``best`` and ``gained`` are its result at any time.

    Memory: two float32 tables ``[channels, channels]`` beside ``columns`` (float32 ``[channels, rows]``, or packed).
    """

    def __init__(self, columns: Array, start: Array, pattern: Pattern, seed: int) -> None:
        channels = len(start)
        self.best, self.gained = start.copy(), 0.0
        self._columns, self._pattern = columns, pattern
        self._order = start.copy()
        self._unit = noise_unit(columns)
        self._state = np.array([seed], dtype=np.uint64)
        self._place = np.empty((channels, channels), dtype=np.float32)
        self._pair = np.empty((channels, channels), dtype=np.float32)
        self._own = np.empty(channels, dtype=np.float32)
        self._values = np.zeros(2)
        self._filled = False

    def step(self, share: float, moves: int) -> int:
        """Go on for about ``moves`` placements, ``share`` of the budget being spent. Returns how many it took."""
        from nm_compiler.solvers.anneal_kernels import anneal, fill

        n, m = self._pattern.n, self._pattern.m
        tables = (self._place, self._pair, self._own)
        if not self._filled:
            fill(self._columns, self._order, n, m, *tables)
            self._filled = True
            return self._order.size**2
        temperature = self._unit * HOT * (COLD / HOT) ** share
        spent = anneal(self._columns, self._order, n, m, *tables, self.best, self._values, self._state, temperature, moves)
        self.gained = float(self._values[1])
        return int(spent)

    def result(self) -> tuple[Array, float]:
        """The best order and what it gained."""
        return self.best, self.gained
