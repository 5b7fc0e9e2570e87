"""Split a compiled kernel's work over torch's number of threads; kernels run without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_LARGE = 1 << 20  # weights above are worth more threads


def in_threads(work: Callable[[slice], object], count: int, numel: int) -> None:
    """Call ``work`` with slices that cover ``range(count)``. numel: weights in all, which decides how many threads pay."""
    threads = min(torch.get_num_threads(), numel // _LARGE + 1, count)
    if threads < 2:
        work(slice(0, count))
        return
    edges = [count * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, map(slice, edges[:-1], edges[1:])))
