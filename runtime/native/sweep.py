"""What sweeps over weights are told: the fields of ``nm_sweep`` in sweep.h, in the same order, 64 bits each."""

from __future__ import annotations

import struct
from typing import NamedTuple

KEEP, GRADIENTS, DECAY, COVER, RETIRE, MASK, LARGEST, COVERED, MAX_SUMS = range(9)
"""Kinds."""
WIDEST = 32
"""The largest M."""
VECTOR = 64
"""Bytes of the longest vector."""


class Sweep(NamedTuple):
    """Addresses and sizes; sweep.h says what each is."""

    kind: int
    item: int
    weight: int = 0
    grad: int = 0
    masked: int = 0
    mask: int = 0
    live: int = 0
    table: int = 0
    order: int = 0
    out: int = 0
    second: int = 0
    outer: int = 1
    groups: int = 1
    inner: int = 1
    n: int = 1
    m: int = 1
    bytes: int = 0
    combinations: int = 0
    keep: int = 0
    decay: float = 0.0


_FIELDS = struct.Struct(f"={len(Sweep._fields) - 1}qdq")
BYTES = _FIELDS.size


def packed(sweep: Sweep, threads: int) -> bytes:
    """The sweep as C reads it."""
    return _FIELDS.pack(*sweep, threads)
