"""Two processes of a data-parallel run, forked from a third that has imported the library once for all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch import multiprocessing as torch_multiprocessing

IMPORTED = ["torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch.export._trace", "nm_compiler.api"]


def run_two(worker: Callable[..., None], *args: Any) -> None:
    """Call ``worker(rank, *args)`` in each, and wait. Raises what torch.multiprocessing.spawn raises."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    start: Any = vars(torch_multiprocessing)["start_processes"]
    start(worker, args, nprocs=2, start_method="forkserver")
