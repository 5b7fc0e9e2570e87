"""What is freed is kept for the next call, or given back."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nm_compiler as nm
from nm_compiler.memory import own_cycles_freed
from nm_compiler.runtime.native.library import load

ROOT = Path(__file__).parents[1]

CALLS = """
import resource
import statistics
import torch

def faults(call):
    # of the last calls: the heap finds its shape in the first ones
    found = []
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(statistics.median(found[-20:]))

def temporaries():
    # four of 5 MB, which are there at the same time
    return [torch.empty(5_000_000, dtype=torch.uint8).fill_(1) for _ in range(4)] and None
"""

KEPT = """
import nm_compiler.runtime.native.ops as ops
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.packing import pack

weight, x = pack(torch.zeros(2048, 64), Pattern(2, 4)), torch.zeros(2000, 64)
# a result of 16 MB, in a process that lowered nothing
faults(lambda: ops.LINEAR(x, weight.values, weight.codes, None, None, None, [2, 4], 2048, ""))
"""

ASKED = """
from nm_compiler.memory import give_back, keep_freed

faults(temporaries)
keep_freed()
faults(temporaries)
give_back()
faults(temporaries)
"""

TRAINED = """
import nm_compiler as nm

sparse = nm.compile(torch.nn.Linear(64, 64), torch.zeros(2, 64), include="*")
nm.SparsityScheduler(sparse, total_steps=10)
faults(temporaries)
"""


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides otherwise")


def printed(program: str, **settings: str) -> list[float]:
    words, env = [sys.executable, "-c", program], {**os.environ, **settings}
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120, env=env)
    return [float(word) for word in done.stdout.split()]


@pytest.mark.ci
@needs_glibc
@pytest.mark.skipif(isinstance(load(), str), reason=f"no CPU kernels here: {load()}")
def test_a_call_finds_the_pages_that_the_one_before_it_freed_once_a_product_ran_or_it_was_asked_for() -> None:
    product, _, kept, again = printed(CALLS + KEPT + ASKED)
    assert product < 100, "a result of 16 MB is 4,000 pages"
    assert kept < 100, "four times five million bytes are 4,883 pages"
    assert again < 100, "what was given back once is kept again"


@pytest.mark.ci
@needs_glibc
def test_what_the_user_set_up_stays() -> None:
    fresh, kept, _ = printed(CALLS + ASKED, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert min(fresh, kept) > 1000


@pytest.mark.ci
@needs_glibc
def test_a_training_step_finds_the_pages_that_the_one_before_it_freed() -> None:
    (kept,) = printed(CALLS + TRAINED)
    assert kept < 100, "four gradients of five million bytes are 4,883 pages"


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def old_garbage() -> weakref.ref[Cycle]:
    cycle = Cycle()
    gc.freeze()
    gc.unfreeze()  # that puts all there is into the oldest generation, without a look at it
    return weakref.ref(cycle)


@pytest.mark.ci
def test_cycles_of_the_body_are_freed_and_older_ones_not_looked_at() -> None:
    before, thresholds = old_garbage(), gc.get_threshold()
    with own_cycles_freed():
        mine = [weakref.ref(Cycle()) for _ in range(300_000)]
    assert not any(ref() is not None for ref in mine)
    assert before() is not None
    assert gc.get_threshold() == thresholds


@pytest.mark.parametrize("automatic", [True, False])
def test_an_error_leaves_the_collector_as_it_was(automatic: bool) -> None:
    thresholds = gc.get_threshold()
    (gc.enable if automatic else gc.disable)()
    try:
        with pytest.raises(KeyError), own_cycles_freed():
            raise KeyError
        assert gc.isenabled() == automatic
    finally:
        gc.enable()
    assert gc.get_threshold() == thresholds


@pytest.mark.ci
def test_compiling_looks_at_no_old_objects_and_leaves_no_exported_program(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    export = torch.export.export

    def noted(*args: Any, **kwargs: Any) -> Any:
        program = export(*args, **kwargs)
        programs.append(weakref.ref(program))
        return program

    monkeypatch.setattr(torch.export, "export", noted)
    before = old_garbage()
    nm.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)), (torch.randn(4, 8),))
    assert len(programs) == 2
    assert not any(ref() is not None for ref in programs)
    assert before() is not None
