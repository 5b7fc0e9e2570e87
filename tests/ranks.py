"""Two processes of a data-parallel run, forked from a third that has imported the library once for all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

IMPORTED = ["torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch.export._trace", "nm_compiler.api"]


def run_two(worker: Callable[..., None], *args: Any) -> None:
    """Call ``worker(rank, *args)`` in each, and wait. Raises what torch.multiprocessing.spawn raises."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    processes: Any = torch.multiprocessing
    processes.start_processes(worker, args, nprocs=2, start_method="forkserver")
