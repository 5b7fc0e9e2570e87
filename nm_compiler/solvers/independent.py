"""Many order searches at once that do not influence each other: who gets how much time, on which core, in how much memory.

Every problem is searched briefly first. What that gained decides the rest: a search gains about as much from every doubling
of its time, in proportion to what there is to gain, so the total is largest where time is shared in proportion to the first
gains, whatever the sizes. A problem that gained nothing gets no more.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import numpy as np

from nm_compiler.pattern import Pattern
from nm_compiler.solvers.search import Found, search
from nm_compiler.solvers.search_budget import Listener, Progress, check_budget
from nm_compiler.solvers.search_matrix import memory_needed
from nm_compiler.solvers.search_members import Member

DEFAULT_NUMBERS = 1.2e11  # added up in all where no budget is given: seconds on two cores
PROBE = 4  # looks at every pair of channels, in the brief search
_MOST_OF_IT = 0.2  # of the budget goes into the brief searches, or less
_NUMBERS_PER_SECOND = 8e9  # that one core adds up, a cautious guess: only the length of the brief searches hangs on it


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Channels that one order permutes. members: made when the search begins, so that not all lie in memory at once;
    rows: of all members together, as `Member.rows` counts them."""

    pattern: Pattern
    channels: int
    rows: int
    members: Callable[[], Sequence[Member]]

    @property
    def look(self) -> int:
        """Numbers that are added up to weigh every channel in every slot once."""
        return self.channels**2 * self.rows

    def search(self, **limits: object) -> Found:
        """Search an order; limits as in `nm_compiler.solvers.search.search`."""
        return search(self.members(), pattern=self.pattern, **limits)  # type: ignore[arg-type]


@dataclass(slots=True)
class Gate:
    """Lets work in as long as all that is in needs no more than ``limit`` bytes; the largest goes alone."""

    limit: float
    _inside: list[float] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def room(self, needed: float) -> Iterator[None]:
        """Wait until ``needed`` bytes are free, and hold them inside the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or sum(self._inside) + needed <= self.limit)
            self._inside.append(needed)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(needed)
                self._changed.notify_all()


@dataclass(slots=True)
class Crew:
    """Threads that search, the memory they may fill, and who is told."""

    workers: int
    progress: Listener | None = None
    gate: Gate = field(default_factory=lambda: Gate(half_of_memory()))
    stop: threading.Event = field(default_factory=threading.Event)
    begin: float = field(default_factory=time.perf_counter)

    def run(
        self, problems: Sequence[Problem], limits: Sequence[dict[str, object]], starts: Sequence[Found | None]
    ) -> list[Found]:
        """Search all of them, the longest first, each within its limits; Ctrl-C ends all and keeps what was found."""
        order = sorted(range(len(problems)), key=lambda i: -problems[i].look)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="nm-order") as pool, _interrupt_sets(self.stop):
            futures: dict[int, Future[Found]] = {i: pool.submit(self._one, problems[i], limits[i], starts[i]) for i in order}
            return [futures[i].result() for i in range(len(problems))]

    def _one(self, problem: Problem, limits: dict[str, object], start: Found | None) -> Found:
        with self.gate.room(memory_needed(problem.channels, problem.rows)):
            if self.stop.is_set():
                return start or Found(np.arange(problem.channels), 0.0, 0, 0.0)
            return problem.search(**limits, start=None if start is None else start.order, progress=self._heard)

    def _heard(self, now: Progress) -> bool:
        if self.progress is not None and self.progress(now):
            self.stop.set()
        return self.stop.is_set()


@contextmanager
def _interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """In the main thread, the first Ctrl-C sets ``stop`` instead of being raised somewhere; a second one is raised."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def once(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def search_all(
    problems: Sequence[Problem], *, budget_s: float | None = None, numbers: float | None = None, seed: int = 0,
    workers: int | None = None, progress: Listener | None = None, stop: threading.Event | None = None,
) -> list[Found]:  # fmt: skip
    """Search the orders of independent problems; what they keep together is worth the same wherever it is kept.

    budget_s: seconds of wall time on ``workers`` cores (all of them by default); numbers: additions, a budget that gives the
    same orders on every machine. Without either, seconds' worth of additions, less for small problems. progress: hears every
    search, and ends all of them with a true answer, as Ctrl-C does in the main thread. stop: set when that happened, so that
    a caller with more to search knows.
    Returns a `Found` for each problem. Raises NMError as `search` does.
    """
    crew = Crew(workers or os.cpu_count() or 1, progress, stop=stop or threading.Event())
    if not problems:
        return []
    if budget_s is None and numbers is None:
        usual = (one.rows * check_budget(None, None, one.channels)[1] for one in problems)  # type: ignore[operator]
        numbers = min(DEFAULT_NUMBERS, float(sum(usual)))
    briefly = _brief(problems, budget_s, numbers, crew.workers)
    first = crew.run(problems, [{"moves": moves, "seed": seed} for moves in briefly], [None] * len(problems))
    gains = np.array([max(0.0, each.gained) for each in first])
    if crew.stop.is_set() or not gains.any():
        return first
    spent = sum(problem.rows * found.moves for problem, found in zip(problems, first, strict=True))
    if budget_s is not None:
        left = max(0.0, budget_s - (time.perf_counter() - crew.begin))
        seconds = shares(gains, left * crew.workers, most=left)
        limits: list[dict[str, object]] = [{"budget_s": float(each), "seed": seed} for each in seconds]
    else:
        assert numbers is not None
        each_gets = shares(gains, max(0.0, numbers - spent), most=numbers)
        limits = [{"moves": int(get // max(1, p.rows)), "seed": seed} for get, p in zip(each_gets, problems, strict=True)]
    chosen = [i for i, gain in enumerate(gains) if gain > 0]
    again = crew.run([problems[i] for i in chosen], [limits[i] for i in chosen], [first[i] for i in chosen])
    result = list(first)
    for i, found in zip(chosen, again, strict=True):
        result[i] = found
    return result


def _brief(problems: Sequence[Problem], budget_s: float | None, numbers: float | None, workers: int) -> list[int]:
    """Moves of the brief search of each problem: a few looks at everything, less where that would eat the budget."""
    wanted = [float(PROBE * problem.channels**2) for problem in problems]
    total = sum(moves * problem.rows for moves, problem in zip(wanted, problems, strict=True))
    there = numbers if numbers is not None else (budget_s or 0.0) * workers * _NUMBERS_PER_SECOND
    scale = min(1.0, _MOST_OF_IT * there / total) if total else 1.0
    return [int(moves * scale) for moves in wanted]


def shares(gains: np.ndarray, total: float, *, most: float) -> np.ndarray:
    """``total`` in proportion to ``gains``, none more than ``most``; what that leaves over goes to the others.

    >>> shares(np.array([8.0, 1.0, 1.0, 0.0]), 10.0, most=5.0)
    array([5. , 2.5, 2.5, 0. ])
    """
    result = np.zeros(len(gains))
    open_ones = gains > 0
    while open_ones.any():
        part = np.where(open_ones, gains, 0.0)
        part /= part.max()  # those left may all be tiny
        proposed = (total - result.sum()) * (part / part.sum())
        over = open_ones & (proposed >= most)
        if not over.any():
            result += proposed
            break
        result[over] = most
        open_ones &= ~over
    return result


def half_of_memory() -> float:
    """Bytes; without bound where the system does not say."""
    try:
        return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return float("inf")
