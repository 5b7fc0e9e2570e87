"""Freed memory: cycles that hold it, and what the C library does with it, give it back or keep it for the next call."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_NEVER = 2**31 - 1  # young collections
_KEPT, _LARGEST = 256 * 2**20, 32 * 2**20
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def memory_of(tensor: Tensor) -> int | None:
    """Which memory a tensor shows, all of it or a part; None if it is no plain one."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if plain else None


@contextmanager
def own_cycles_freed() -> Generator[None]:
    """Free at the end, errors too, what the body left behind in cycles, and look at no older object for it.

    A whole collection visits every object of the process: 0.2 s once torch is imported, ten seconds beside much else. While
    automatic collections are of the youngest only, what survives them lies in the next generation: see `free_young`.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(thresholds[0], _NEVER, _NEVER)
    try:
        yield
    finally:
        free_young()
        gc.set_threshold(*thresholds)


def free_young() -> None:
    """Free the cycles of the two younger generations; of all where Python collects old ones bit by bit."""
    gc.collect(1 if sys.version_info < (3, 14) else 2)


def give_back() -> None:
    """Have the C library return what is free in it. glibc alone needs to be told, and only it is."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed() -> None:
    """Have glibc keep what a call frees, up to 256 MiB in blocks of up to 32 MiB each, for the next one.

    Else each call's temporaries come in fresh pages: MobileNetV2 took 2,300 page faults a call, and 18 ms instead of 12.
    Another C library is left alone, and so is one that the user has set up by the environment.
    """
    option = _of_glibc("mallopt")
    if option is not None and not any(name in os.environ for name in _SETTINGS):
        option(_MMAP_THRESHOLD, _LARGEST)
        option(_TRIM_THRESHOLD, _KEPT)


def _of_glibc(name: str) -> Any:
    """A function of glibc by name; None on other systems, and where it is missing."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
