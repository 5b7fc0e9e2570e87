"""Bi-Mask's backward order: how much of the forward weight its backward mask keeps, by who chooses the order."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from reproduction.grid import random_search

import nm_compiler as nm
from ablations.digits import Training, network
from nm_compiler.demo.train import accuracy

VARIANTS: dict[str, Callable[[int], nm.BiMask]] = {
    "search": lambda interval: nm.BiMask(interval=interval),
    "search, by count": lambda interval: nm.BiMask(interval=interval, objective="count"),
    "best of 100 random, by count (paper)": lambda interval: nm.BiMask(
        interval=interval, objective="count", search=partial(random_search, draws=100)
    ),
    "best of 10 random, by count (paper, CIFAR)": lambda interval: nm.BiMask(
        interval=interval, objective="count", search=partial(random_search, draws=10)
    ),
    "none": lambda interval: nm.BiMask(interval=interval, moves=0),
}
EVERY = 25  # steps between two measurements: not a multiple of the interval, so that they are of any age of an order


def measure(training: Training, variant: str, interval: int, pattern: str, seed: int) -> dict[str, Any]:
    """One training. kept: sum |W * B| / sum |W * F|, gap: sum ((F - B) * W)^2 / sum (F * W)^2, count_kept: non-zeros of B
    beside those of F; all are of all weights together, means over the training, measured every `EVERY` steps.
    """
    model = network(seed)
    sparse = nm.compile(model, (training.example,), pattern=pattern, method=VARIANTS[variant](interval), seed=seed)
    scheduler, telemetry = nm.SparsityScheduler(sparse, training.steps), nm.Telemetry(sparse, every=EVERY)
    kept, gap, counts = [], [], []

    def after(step: int) -> None:
        scheduler.step()
        row = telemetry.step()
        if row:
            kept.append(row["total"]["backward_kept"])
            gap.append(row["total"]["gradient_gap"])
            counts.append(_count_kept(sparse))

    training.run(sparse, seed, before=lambda step: None, after=after)
    frozen = nm.freeze(sparse)
    assert nm.verify(frozen, pattern).satisfied
    return {
        "kept": statistics.fmean(kept), "kept_at_end": kept[-1], "gap": statistics.fmean(gap), "gap_at_end": gap[-1],
        "count_kept": statistics.fmean(counts), "accuracy": accuracy(frozen, training.data),
    }  # fmt: skip


def _count_kept(sparse: nm.SparseModule) -> float:
    forward = backward = 0
    for weight in sparse.weights:
        both = sparse.masked(weight.site.name)
        assert both[0] is not None
        assert both[1] is not None
        forward, backward = forward + int(both[0].count_nonzero()), backward + int(both[1].count_nonzero())
    return backward / forward
