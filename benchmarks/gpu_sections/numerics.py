"""The tests that need a GPU, as part of the script that brings its figures back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from gpu_sections.timing import Found

ROOT = Path(__file__).resolve().parents[2]


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Run pytest on tests/test_gpu.py; the last lines of what it says, and how many passed and failed."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x" if dry else "--maxfail=60",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
    ]
    words += ["-n", "8"] if find_spec("xdist") else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    tail = done.stdout[-5000:]
    print(tail, flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tail)}
    found |= {"returncode": done.returncode, **counts, "tail": tail}
