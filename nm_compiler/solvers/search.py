"""The order of channels that keeps the most under N:M: one matrix, or all weights that a class of channels runs through.

Exact search is out of reach beyond a dozen channels; this one anneals swaps or refills many slots at once, whichever was
measured to be better for the size, and returns the best order it has seen. benchmarks/solvers.py compares it with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.anneal import Annealing
from nm_compiler.solvers.neighbourhood import Neighbourhood
from nm_compiler.solvers.search_budget import Listener, Meter, Progress, check_budget
from nm_compiler.solvers.search_matrix import TABLE_UP_TO, packed_if_binary, stack, sum_of
from nm_compiler.solvers.search_members import Array, Member, as_members, check_order, retained

_MARGIN = 1e-6  # relative: gains below it may be rounding
_STEP = 1 << 30  # numbers added up between two looks at the clock: about 50 ms
_STEPS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A searched order, int64 ``[channels]``, and what it took: moves and seconds.

    total: importance of the members that could be searched, weights multiplied in; share: of it, what the identity keeps;
    gain: of the order over the identity, relative to what that keeps.
    """

    order: Array
    gain: float
    moves: int
    seconds: float
    share: float = 1.0
    total: float = 0.0

    @property
    def gained(self) -> float:
        """What the order keeps more than the identity, in units of the importance."""
        return self.gain * self.share * self.total


def search_order(
    importance: ArrayLike | Tensor | Member | Sequence[Member],
    *,
    pattern: str | tuple[int, int] | Pattern,
    budget_s: float | None = None,
    moves: int | None = None,
    seed: int = 0,
    start: ArrayLike | Tensor | None = None,
    progress: Listener | None = None,
) -> Array:
    """Search an order of the channels under which N:M groups of ``pattern`` keep the most.

    importance: ``[rows, channels]``, not negative, any real dtype and memory layout; or the `Member` s of a coupled class.
    budget_s: seconds; moves: placements weighed (a channel tried in a slot), the unit of work that is the same on every
    machine: with moves alone the result depends on the seed only. Without either, seconds' worth of moves.
    start: an order to begin with. progress: see `Listener`. Ctrl-C ends the search and gives the best so far.

    Returns int64 ``[channels]``, ``new[i] = old[order[i]]``: never keeps less than the identity, nor than ``start``.
    Raises NMError if M does not divide the axis, for NaN, infinite or negative importance, for a wrong start or budget,
    and before an allocation that exceeds the machine's memory. The first search on a machine compiles its kernels, some
    ten seconds beside the budget.
    """
    return search(importance, pattern=pattern, budget_s=budget_s, moves=moves, seed=seed, start=start, progress=progress).order


def search(
    importance: ArrayLike | Tensor | Member | Sequence[Member],
    *,
    pattern: str | tuple[int, int] | Pattern,
    budget_s: float | None = None,
    moves: int | None = None,
    seed: int = 0,
    start: ArrayLike | Tensor | None = None,
    progress: Listener | None = None,
) -> Found:
    """`search_order` with an account of what was gained. Same arguments, same errors."""
    nm = Pattern.parse(pattern)
    members = as_members(importance, nm)
    channels = members[0].channels
    given = check_order(start, channels)
    limit_s, limit_moves = check_budget(budget_s, moves, channels)
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
        raise NMError(f"seed={seed!r}: a whole number")
    columns, total = stack(members, nm)
    if channels <= nm.m or not columns.any():  # one group, or nothing that single swaps change
        return Found(_safe(members, nm, [np.arange(channels), given]), 0.0, 0, 0.0, total=total)
    from nm_compiler.solvers.search_kernels import kept_sum, warm_up

    dealt, columns = snake(columns, nm.m), packed_if_binary(columns)
    warm_up(columns.dtype)
    meter = Meter(limit_s, limit_moves)
    base = _better(members, nm, columns, given)
    before, kept = (float(kept_sum(columns, order, nm.n, nm.m)) for order in (np.arange(channels), base))
    first = dealt if float(kept_sum(columns, dealt, nm.n, nm.m)) > kept * (1 + _MARGIN) else base
    kept = float(kept_sum(columns, first, nm.n, nm.m))
    kind = Annealing if channels <= TABLE_UP_TO else Neighbourhood
    engine = kind(columns, first, nm, int(seed) % 2**64)
    _run(engine, meter, progress, most=_STEP // columns.shape[1], kept=kept)
    best, gained = engine.result()
    order = _safe(members, nm, [best if gained > _MARGIN * kept else first, base])
    gain = float(kept_sum(columns, order, nm.n, nm.m)) / before - 1
    return Found(order, gain, meter.spent, meter.seconds(), before / sum_of(columns), total)


def _better(members: Sequence[Member], pattern: Pattern, columns: Array, given: Array) -> Array:
    """The better of the identity and a given order, exactly where the two are close."""
    from nm_compiler.solvers.search_kernels import kept_sum

    identity = np.arange(len(given))
    if np.array_equal(identity, given):
        return identity
    left, right = (float(kept_sum(columns, order, pattern.n, pattern.m)) for order in (identity, given))
    if abs(left - right) < _MARGIN * left:
        left, right = (retained(members, order, pattern=pattern) for order in (identity, given))
    return given if right > left else identity


def _run(engine: Annealing | Neighbourhood, meter: Meter, progress: Listener | None, *, most: int, kept: float) -> None:
    """Step until the budget is spent, the listener has heard enough, or Ctrl-C."""
    try:
        while (share := meter.share()) < 1:
            meter.spent += engine.step(share, meter.step(_STEPS, max(1, most)))
            now = Progress(min(1.0, meter.share()), meter.spent, meter.seconds(), engine.gained / kept)
            if progress is not None and progress(now):
                break
    except KeyboardInterrupt:
        pass  # the best so far stands


def _safe(members: Sequence[Member], pattern: Pattern, candidates: Sequence[Array]) -> Array:
    """The candidate that keeps the most of all members together; the first where a search has seen every group."""
    if all(each.is_aligned(pattern.m) or each.is_indifferent(pattern.m) for each in members):
        return candidates[0]
    values = [retained(members, order, pattern=pattern) for order in candidates]
    return candidates[int(np.argmax(values))]


def snake(columns: Array, m: int) -> Array:
    """Channels dealt to the groups by falling sum, to and fro, so that every group has strong and weak ones.

    columns: ``[channels, rows]``. Returns int64 ``[channels]``. Ref: RIA's heuristic allocation (Zhang et al., ICLR 2024).
    """
    falling = np.argsort(-columns.sum(axis=1, dtype=np.float64), kind="stable")
    dealt = falling.reshape(m, -1)
    dealt[1::2] = dealt[1::2, ::-1].copy()
    return np.ascontiguousarray(dealt.T).reshape(-1)
