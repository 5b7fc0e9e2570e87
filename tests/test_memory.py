"""What is freed is kept for the next call, or given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nm_compiler.runtime.native.library import load

ROOT = Path(__file__).parents[1]

CALLS = """
import resource
import statistics
import torch
from nm_compiler.memory import give_back, keep_freed

def faults():
    # of a call with four temporaries of 5 MB, which are there at the same time
    def call():
        return [torch.empty(5_000_000, dtype=torch.uint8).fill_(1) for _ in range(4)] and None
    # of the last: the heap finds its shape in the first calls
    return statistics.median([faulted(call) for _ in range(40)][-20:])

def faulted(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed()
print(faults())
give_back()
print(faults())
"""

LOADED = """
import resource
import statistics
import torch
import nm_compiler.runtime.native.ops as ops
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.packing import pack

weight = pack(torch.zeros(2048, 64), Pattern(2, 4))
x = torch.zeros(2000, 64)

def call():
    # a result of 16 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ops.LINEAR(x, weight.values, weight.codes, None, None, None, [2, 4], 2048, "")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# of the last: the heap finds its shape in the first calls
print(statistics.median([call() for _ in range(40)][-20:]))
"""


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides otherwise")


def printed(program: str, **settings: str) -> list[float]:
    words, env = [sys.executable, "-c", program], {**os.environ, **settings}
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120, env=env)
    return [float(word) for word in done.stdout.split()]


@needs_glibc
def test_a_call_finds_the_pages_that_the_one_before_it_freed() -> None:
    # what glibc does by itself depends on where the heap happens to lie; the test below pins it
    _, kept, again = printed(CALLS)
    assert kept < 100, "four times five million bytes are 4,883 pages"
    assert again < 100, "what was given back once is kept again"


@needs_glibc
def test_what_the_user_set_up_stays() -> None:
    fresh, kept, _ = printed(CALLS, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert min(fresh, kept) > 1000


@needs_glibc
@pytest.mark.skipif(isinstance(load(), str), reason=f"no CPU kernels here: {load()}")
def test_packed_products_keep_it_in_a_process_that_lowered_nothing() -> None:
    (faults,) = printed(LOADED)
    assert faults < 100, "a result of 16 MB is 4,000 pages"
