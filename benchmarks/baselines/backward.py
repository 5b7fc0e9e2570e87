"""Bi-Mask's backward order as the paper's code searches it.

A weight ``[out, in]``; forward groups along ``in``, backward groups of the forward mask along ``out``.
"""

from __future__ import annotations

from published import PublishedBiMask
from torch import Tensor, nn


def kept(mask: Tensor, order: Tensor, n: int, m: int) -> float:
    """How many entries of a forward mask the backward mask keeps when the rows are taken in ``order``."""
    counts = mask[order].unflatten(0, (-1, m)).sum(dim=1)
    return float(counts.clamp(max=n).sum())


def random_hundred(weight: Tensor, n: int, m: int) -> Tensor:
    """The best of 100 random orders by the count that both masks keep, as the paper's code searches it."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data.copy_(weight)
    published = PublishedBiMask(layer, n, m, candidates=100)
    published.search()
    return published.order


def bound(mask: Tensor, n: int, m: int) -> float:
    """No order keeps more: ``sum over columns of min(entries, N * out / M)``."""
    return float(mask.sum(dim=0).clamp(max=n * len(mask) // m).sum())
