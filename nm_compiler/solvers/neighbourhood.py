"""Search by a large neighbourhood: many slots refilled at once, optimally. The better way from some hundred channels on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nm_compiler.pattern import Pattern
from nm_compiler.solvers import coarse
from nm_compiler.solvers.search_matrix import noise_unit
from nm_compiler.solvers.search_members import Array

LOUD, QUIET = 0.035, 0.007  # noise on the scores at the start and the end, in units of `noise_unit`; found by trial
AT_ONCE = 256  # slots refilled in one round: the assignment's cost grows with the cube
_SILENT = 0.97  # share of the budget after which there is no noise at all
_LOOK = 8  # rounds of rounded scores, after which the order is looked at exactly


class _View(NamedTuple):
    """The columns as they are weighed: exactly or rounded. steps: of the scores in a unit of the columns."""

    columns: Array
    steps: float
    slots: Array
    scores: Array
    weigh: Callable[[Array, Array, Array, Array], None]


class Neighbourhood:
    """A search that is under way; ``best`` and ``gained`` are the best order that was looked at exactly, `result` the end.

    Every round takes a random slot out of up to ``at_once`` random groups, weighs all their channels in all those slots, adds
    noise that fades, and refills them by linear assignment. columns: float32 ``[channels, rows]``, or packed. Under noise
    float32 ones are weighed as bytes, and every few rounds the order is looked at exactly.
    """

    def __init__(self, columns: Array, start: Array, pattern: Pattern, seed: int, at_once: int = AT_ONCE) -> None:
        self.best, self.gained = start.copy(), 0.0
        self._columns, self._pattern = columns, pattern
        self._order, self._value = start.copy(), 0.0
        self._unit = noise_unit(columns)
        self._state = np.array([seed], dtype=np.uint64)
        self._groups = np.arange(len(start) // pattern.m)
        self._places = np.empty(min(at_once, len(self._groups)), dtype=np.int64)
        self._rounded = 0  # rounds since the order's value was known

    def step(self, share: float, moves: int) -> int:
        """Go on for about ``moves`` placements, at least a round. Returns how many it took."""
        from nm_compiler.solvers.neighbourhood_kernels import draw, refill

        noise = self._unit * LOUD * (QUIET / LOUD) ** share if share < _SILENT else 0.0
        rounding = noise > 0 and self._columns.dtype == np.float32  # packed ones are quick as they are
        view = self._coarse if rounding else self._exact
        if self._rounded and not rounding:
            self._look()
        n, m, order, places, state = self._pattern.n, self._pattern.m, self._order, self._places, self._state
        placements, spent = len(places) ** 2, 0
        while spent == 0 or spent + placements <= moves:
            draw(view.columns, order, n, m, self._groups, state, view.slots, places)
            view.weigh(view.slots, view.columns, order[places], view.scores)
            gained = refill(order, places, view.scores, noise * view.steps, state)
            spent += placements
            if rounding:
                self._rounded += 1
            else:
                self._note(self._value + gained)
        if self._rounded >= _LOOK:
            self._look()
        return spent

    def result(self) -> tuple[Array, float]:
        """The best order and what it gained; the last rounds, which nobody looked at yet, are looked at."""
        if self._rounded:
            self._look()
        return self.best, self.gained

    def _note(self, value: float) -> None:
        self._value = value
        if value > self.gained:
            self.gained = float(value)
            self.best[:] = self._order

    def _look(self) -> None:
        self._rounded = 0
        self._note(self._kept(self._order) - self._before)

    def _kept(self, order: Array) -> float:
        from nm_compiler.solvers.search_kernels import kept_sum

        return float(kept_sum(self._columns, order, self._pattern.n, self._pattern.m))

    @cached_property
    def _before(self) -> float:
        """What the start keeps."""
        return self._kept(self.best) - self.gained

    @cached_property
    def _exact(self) -> _View:
        from nm_compiler.solvers.neighbourhood_kernels import weigh

        return self._view(self._columns, 1.0, np.float32, weigh)

    @cached_property
    def _coarse(self) -> _View:
        columns, steps = coarse.as_bytes(self._columns)
        return self._view(columns, steps, np.int64, coarse.weigh)

    def _view(self, columns: Array, steps: float, scores: type, weigh: Callable[[Array, Array, Array, Array], None]) -> _View:
        count = len(self._places)
        slots = np.empty((count, columns.shape[1]), dtype=columns.dtype)
        return _View(columns, steps, slots, np.empty((count, count), dtype=scores), weigh)
