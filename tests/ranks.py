"""Two processes of a data-parallel run, forked from a third that has imported the library once for all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import multiprocessing as torch_multiprocessing
from unmeasured import unmeasured

IMPORTED = ["torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch.export._trace", "nm_compiler.api"]


def run_two(worker: Callable[..., None], *args: Any) -> None:
    """Call ``worker(rank, *args)`` in each, in one gloo group, and wait. Raises what torch.multiprocessing.spawn raises."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    start: Any = vars(torch_multiprocessing)["start_processes"]
    with tempfile.TemporaryDirectory() as folder:
        start(_rank, (worker, f"{folder}/store", args), nprocs=2, start_method="forkserver")


def _rank(rank: int, worker: Callable[..., None], store: str, args: tuple[Any, ...]) -> None:
    """Leaves without freeing the group: its destructor may wait for a thread of gloo's that waits for the GIL, for ever."""
    unmeasured()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    worker(rank, *args)
    torch.distributed.barrier()  # the other one may still need this one
    os._exit(0)


@contextlib.contextmanager
def in_company(rank: int = 0) -> Iterator[None]:
    """This process is one of two, whose other one answers nothing: for what only asks which it is."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
