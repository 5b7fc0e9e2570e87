"""Where the entries of a class lie along an axis that may be merged from several.

An order only moves N:M groups about where a class runs fastest: the heads of ``heads x dim`` move whole groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nm_compiler.axes.result import Axis, Family, Leaf, Product, Sum, restricted

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """A class in its own order along ``size`` consecutive entries from ``start``. row: of the order that applies there."""

    start: int
    row: int


def runs(axis: Axis, name: str, needs: Sequence[str], rows: Sequence[int]) -> Iterator[Run]:
    """The runs of the class ``name`` along ``axis``; none where it moves whole blocks.

    needs, rows: what the rows of its order count, and their sizes; a need that lies in another axis has no runs here.
    """
    indices = coordinates(axis)
    mine = indices.get(name)
    if mine is None or any(need not in indices for need in needs):
        return
    starts = np.flatnonzero(mine == 0)
    size = int(mine.max()) + 1
    for start in starts.tolist():
        run = mine[start : start + size]
        if len(run) == size and bool((run == np.arange(size)).all()):
            where = [int(indices[need][start]) for need in needs]
            yield Run(start, int(np.ravel_multi_index(where, tuple(rows))) if where else 0)


def coordinates(axis: Axis) -> dict[str, Indices]:
    """For every class of an axis, the index into it that each entry of the axis has; -1 where it has none."""
    if isinstance(axis, Leaf):
        return {axis.name: np.arange(axis.size)}
    if isinstance(axis, Family):  # keyed by another axis: no index is known here
        return {}
    if isinstance(axis, Sum):
        return _joined([(coordinates(part), part.size) for part in axis.parts])
    slow, *fast = axis.parts
    if isinstance(slow, Sum):
        pieces = []
        for part in slow.parts:
            inner = tuple(restricted(other, part) for other in fast)
            size = part.size * (axis.size // slow.size)
            pieces.append((coordinates(Product((part, *inner), size)), size))
        return _joined(pieces)
    rest: Axis = fast[0] if len(fast) == 1 else Product(tuple(fast), axis.size // slow.size)
    outer = {name: np.repeat(index, rest.size) for name, index in coordinates(slow).items()}
    return outer | {name: np.tile(index, slow.size) for name, index in coordinates(rest).items()}


def _joined(pieces: Sequence[tuple[dict[str, Indices], int]]) -> dict[str, Indices]:
    names = dict.fromkeys(name for found, _ in pieces for name in found)
    return {name: np.concatenate([found.get(name, np.full(size, -1)) for found, size in pieces]) for name in names}
