"""Memory that was freed goes back to the system, where the C library keeps it for later."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Have the C library return what is free in it. glibc alone needs to be told, and only it is."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
