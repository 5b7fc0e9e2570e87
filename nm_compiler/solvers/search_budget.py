"""How long a search may take, in seconds or in moves, and what it tells while it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nm_compiler.errors import NMError

DEFAULT_MOVES = 10_000_000


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search stands: ``share`` of its budget is spent; ``gained`` is the best gain over the start so far,
    as a share of what the start keeps."""

    share: float
    moves: int
    seconds: float
    gained: float


Listener = Callable[[Progress], object]
"""Called about 20 times a second at most; a true answer ends the search."""


@dataclass(slots=True)
class Meter:
    """A budget that is being spent. Either limit may be None, not both; the first one reached ends the search."""

    budget_s: float | None
    moves: int | None
    begin: float = field(default_factory=time.perf_counter)
    spent: int = 0

    def share(self) -> float:
        """The share of the budget that is spent, 0 to 1 or more. It depends on moves alone where only moves are given."""
        by_moves = 0.0 if self.moves is None else self.spent / max(1, self.moves)
        by_time = 0.0 if self.budget_s is None else self.seconds() / max(1e-9, self.budget_s)
        return max(by_moves, by_time)

    def seconds(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.begin

    def step(self, pieces: int, most: int) -> int:
        """Moves to spend next, so that a search has ``pieces`` steps or more; ``most`` keeps a step short."""
        if self.moves is not None:
            return max(1, min(self.moves // pieces, most))
        done = self.share()
        if done <= 0 or not self.spent:
            return max(1, most // 256)
        return max(1, min(math.ceil(self.spent / done / pieces), most))


def check_budget(budget_s: float | None, moves: int | None, channels: int) -> tuple[float | None, int | None]:
    """The limits of a search, a default in moves where none is given. Raises NMError."""
    if budget_s is not None and not (isinstance(budget_s, (int, float)) and budget_s >= 0):
        raise NMError(f"budget_s={budget_s!r}: seconds, a number >= 0")
    if moves is not None and (not isinstance(moves, int) or isinstance(moves, bool) or moves < 0):
        raise NMError(f"moves={moves!r}: a whole number >= 0")
    if budget_s is None and moves is None:
        return None, min(DEFAULT_MOVES, 10_000 * channels**2)
    return budget_s, moves
