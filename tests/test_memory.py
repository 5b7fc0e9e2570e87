"""What is freed is kept for the next call, or given back."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = """
import resource
import torch
from nm_compiler.memory import give_back, keep_freed

def faults():
    # of a call with four temporaries of 5 MB, which are there at the same time
    def call():
        return [torch.empty(5_000_000, dtype=torch.uint8).fill_(1) for _ in range(4)] and None
    for _ in range(3):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

print(faults())
keep_freed()
print(faults())
give_back()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides otherwise")
def test_a_call_finds_the_pages_that_the_one_before_it_freed() -> None:
    words = [sys.executable, "-c", CALLS]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], timeout=120)
    fresh, kept, again = map(float, done.stdout.split())
    assert fresh > 1000, "four times five million bytes are 4,883 pages"
    assert kept < 100
    assert again < 100, "what was given back once is kept again"
