"""All members of a class as one matrix: a row for every row of a member, weights multiplied in, a column a channel."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.search_members import Array, Member, blocks, checked

TABLE_UP_TO = 256  # channels: two tables of all swaps are kept; beyond, refilling many slots at once is the better search


def stack(members: Sequence[Member], pattern: Pattern) -> tuple[Array, float]:
    """The aligned members as float32 ``[channels, rows]``, scaled to a mean of one (all zero stays zero); their sum before.

    A group of consecutive columns keeps the same in this matrix as in all members together, up to the scale.
    Raises NMError for values that are no importance, and before a matrix is made that cannot fit into memory.
    """
    channels = members[0].channels
    aligned = [each for each in members if each.is_aligned(pattern.m) and not each.is_indifferent(pattern.m)]
    rows = sum(member.rows for member in aligned)
    _check_memory(channels, rows)
    columns = np.zeros((channels, rows), dtype=np.float32)
    values = [checked(member) for member in aligned]
    largest = [float(each.max()) if each.numel() else 0.0 for each in values]
    heaviest = max((member.weight * most for member, most in zip(aligned, largest, strict=True)), default=0.0)
    at, total = 0, 0.0
    for member, tensor, most in zip(aligned, values, largest, strict=True):
        used = slice(member.start, member.start + member.outer * channels)
        for block in blocks(member, tensor, pattern):
            width = len(block) * member.outer
            target = columns[:, at : at + width]
            at += width
            total += member.weight * float(block[:, used].sum(dtype=np.float64))
            if most > 0:  # divided by the largest first: neither huge nor tiny values leave the range of float32
                part = block[:, used].reshape(len(block), member.outer, channels) / block.dtype.type(most)
                np.multiply(part.transpose(2, 0, 1).reshape(channels, width), member.weight * most / heaviest, out=target)
    mean = float(columns.mean(dtype=np.float64)) if columns.size else 0.0
    if mean > 0:
        columns *= np.float32(1 / mean)
    return columns, total


def packed_if_binary(columns: Array) -> Array:
    """Zeros and one other value, as bits: uint64 ``[channels, words]``; any other matrix as it is."""
    highest = columns.max(initial=0)
    bits = np.zeros((len(columns), -(-columns.shape[1] // 64) * 8), dtype=np.uint8)
    for start in range(0, len(columns), 64):  # piece by piece: a mask of the whole matrix would cost memory
        part = columns[start : start + 64]
        ones = part == highest
        if not (ones | (part == 0)).all():
            return columns
        bits[start : start + 64, : -(-columns.shape[1] // 8)] = np.packbits(ones, axis=1, bitorder="little")
    return bits.view(np.uint64)


def sum_of(columns: Array) -> float:
    """The sum of all entries of ``[channels, rows]``, or the number of ones of packed ``[channels, words]``."""
    if columns.dtype == np.uint64:
        return float(np.unpackbits(columns.view(np.uint8)).sum(dtype=np.int64))
    return float(columns.sum(dtype=np.float64))


def noise_unit(columns: Array) -> float:
    """The scale of temperatures: the norm of the matrix over the root of its columns. What a swap gains is in proportion.

    columns: float32 ``[channels, rows]``, or packed ones.
    """
    if columns.dtype == np.uint64:
        return math.sqrt(sum_of(columns) / len(columns))
    return float(np.linalg.norm(columns.reshape(-1)) / np.sqrt(len(columns)))


def memory_needed(channels: int, rows: int) -> int:
    """Bytes that a search takes beside the importance itself."""
    tables = 2 * channels * channels if channels <= TABLE_UP_TO else 0
    rounded = 0 if channels <= TABLE_UP_TO else channels * rows  # as bytes
    return 4 * (channels * rows + tables + 600 * rows) + rounded + (32 << 20)


def _check_memory(channels: int, rows: int) -> None:
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system: let the allocation speak
        return
    needed = memory_needed(channels, rows)
    if needed > there:
        raise NMError(
            f"a search over [{rows}, {channels}] needs {needed / 2**30:.1f} GiB, this machine has {there / 2**30:.1f}: "
            "leave rows out or search parts of it"
        )
