"""What all sections share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """How often and on which matrices: ``seeds`` are drawn afresh for every run unless given."""

    seeds: tuple[int, ...]
    quick: bool


def timed(work: Callable[..., Result], *arguments: Any, **options: Any) -> tuple[Result, float]:
    """The result of a call and its seconds."""
    start = time.perf_counter()
    result = work(*arguments, **options)
    return result, time.perf_counter() - start


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of several calls, one unmeasured before."""
    work()
    return median(timed(work)[1] for _ in range(repeats))


def verdict(value: float, reach: float | None) -> str:
    """The bound that has to be reached, and whether it is."""
    return "" if reach is None else f"{reach:g} {'met' if value >= reach else 'MISSED'}"


def middle(values: list[float]) -> dict[str, Any]:
    """Median and all values, for the JSON."""
    return {"median": median(values), "values": values}
