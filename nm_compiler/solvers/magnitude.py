"""Keep the N largest magnitudes of every group of M."""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRWISE_UP_TO = 8  # beyond, M(M-1)/2 comparisons cost more than looking for the largest a few times
_AT_ONCE = 1 << 24  # weights, beyond which M bytes for each of them are too many
_PICKED_UP_TO = 4  # beyond, N searches cost more than a sort
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitude_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Top-``n`` magnitudes of every ``m`` consecutive weights along ``axis``; equal ones keep the lower index.

    weight: any floating dtype, any strides, ``size(axis)`` a multiple of ``m``. NaN counts as the largest of all.
    Returns bool of the weight's shape and strides, exactly ``n`` ones in each group.
    """
    return _mask(weight, magnitude_bits(weight), n, m, axis)


def value_mask(scores: Tensor, n: int, m: int, axis: int) -> Tensor:
    """The ``n`` largest of every ``m`` consecutive scores along ``axis``: as `magnitude_mask`, but -2 is less than 1.

    >>> value_mask(torch.tensor([-3.0, -1.0, 2.0, -2.0]), 2, 4, 0)
    tensor([False,  True,  True, False])
    """
    return _mask(scores, _ordered_bits(scores), n, m, axis)


def _mask(weight: Tensor, bits: Tensor, n: int, m: int, axis: int) -> Tensor:
    """The ``n`` largest of every ``m`` whole numbers, of the weight's strides."""
    mask = torch.empty_like(weight, dtype=torch.bool)
    kept = mask.movedim(axis, -1).unflatten(-1, (-1, m))
    groups = bits.movedim(axis, -1).unflatten(-1, (-1, m))
    if m <= _PAIRWISE_UP_TO and weight.device.type != "cpu" and weight.numel() <= _AT_ONCE:
        _by_comparing_all(groups, kept, n)
    elif m <= _PAIRWISE_UP_TO:
        _by_comparison(groups, kept, n)
    elif n <= _PICKED_UP_TO:
        kept.zero_()
        left = groups.clone()
        for _ in range(n):  # argmax gives the first among equals
            best = left.argmax(dim=-1, keepdim=True)
            kept.scatter_(-1, best, True)
            left.scatter_(-1, best, torch.iinfo(left.dtype).min)
    else:
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
        kept.zero_().scatter_(-1, best, True)
    return mask


def magnitude_bits(weight: Tensor) -> Tensor:
    """|w| as whole numbers in the same order: the bits without the sign. NaN comes above infinity, and zeros are equal."""
    whole = _WHOLE[weight.element_size()]
    bits: Tensor = weight.detach().view(whole) & torch.iinfo(whole).max
    return bits


def _ordered_bits(scores: Tensor) -> Tensor:
    """Scores as whole numbers in the same order: the bits, those under a minus sign turned over. NaN comes above infinity."""
    bits = torch.where(scores.isnan(), float("nan"), scores.detach() + 0.0).view(_WHOLE[scores.element_size()])
    return bits ^ ((bits >> (8 * scores.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def _by_comparing_all(groups: Tensor, kept: Tensor, n: int) -> None:
    """The same as `_by_comparison` in ten launches instead of thirty: on a GPU they cost more than the arithmetic."""
    first = groups.unsqueeze(-1) >= groups.unsqueeze(-2)  # [.., i, j]
    m = groups.shape[-1]
    pairs = torch.ones(m, m, dtype=torch.bool, device=groups.device).triu(1)  # i < j
    ranks = (first & pairs).sum(-2, dtype=torch.int8) + (pairs > first).sum(-1, dtype=torch.int8)
    torch.lt(ranks, n, out=kept)


def _by_comparison(groups: Tensor, kept: Tensor, n: int) -> None:
    """Rank of j = how many beat it. A pair (i < j) is one comparison: i beats j if not smaller, else j beats i."""
    entries = groups.unbind(-1)
    m = len(entries)
    ranks = [torch.full_like(entries[0], m - 1 - j, dtype=torch.int8) for j in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            first = (entries[i] >= entries[j]).view(torch.int8)
            ranks[j] += first
            ranks[i] -= first
    for j, rank in enumerate(ranks):
        torch.lt(rank, n, out=kept.select(-1, j))
