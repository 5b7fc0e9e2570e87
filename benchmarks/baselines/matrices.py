"""Importance matrices to search on. No trained weights are at hand: three kinds with what trained ones are known to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def gauss(rows: int, channels: int, seed: int) -> Array:
    """Magnitudes of independent normal entries: a fresh initialisation, where an order can gain least."""
    return np.abs(np.random.default_rng(seed).standard_normal((rows, channels), dtype=np.float32))


def trained(rows: int, channels: int, seed: int) -> Array:
    """Low rank plus heavy-tailed noise (Student's t, 5 degrees of freedom), rows and channels of unequal scale."""
    rng = np.random.default_rng(seed)
    rank = max(2, min(rows, channels) // 16)
    low = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, channels)) / np.sqrt(rank)
    noise = rng.standard_t(5, (rows, channels))
    scale = rng.lognormal(0, 0.35, (rows, 1)) * rng.lognormal(0, 0.6, (1, channels))
    values: Array = np.abs((low + noise) * scale).astype(np.float32)
    return values


def neighbours(rows: int, channels: int, seed: int) -> Array:
    """Eight neighbouring channels share which rows they are strong in: the layout that N:M groups suffer from most."""
    rng = np.random.default_rng(seed)
    profile = np.repeat(rng.lognormal(0, 1.0, (rows, channels // 8)), 8, axis=1)
    return (np.abs(rng.standard_normal((rows, channels))) * profile).astype(np.float32)


KINDS: dict[str, Callable[[int, int, int], Array]] = {"gauss": gauss, "trained": trained, "neigh": neighbours}
