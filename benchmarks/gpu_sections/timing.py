"""Milliseconds on a device: events around each call on a GPU, variants in turn, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from nm_compiler.runtime.choose import replayed

__all__ = ["Found", "Work", "in_turn", "once", "replayed"]

Work = Callable[[], object]
Found = dict[str, Any]
"""What a section has found so far: filled as it goes, so that nothing is lost if it ends early."""


def once(work: Work, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def in_turn(
    work: Mapping[str, Work], device: torch.device, *, repeats: int, warmup: int = 2, calls: int = 1
) -> dict[str, float]:
    """Median milliseconds of one call of each variant, one round after the other; ``calls`` at a time for short ones."""

    def several(each: Work) -> Work:
        return each if calls == 1 else lambda: [each() for _ in range(calls)]

    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(warmup + repeats):
        for name, each in work.items():
            spent = once(several(each), device) / calls
            if number >= warmup:
                taken[name].append(spent)
    return {name: median(values) for name, values in taken.items()}
