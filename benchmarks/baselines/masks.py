"""Magnitude masks as the released code of LBC, SR-STE and Bi-Mask makes them, and by the other ways at hand in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nm_compiler.pattern import Pattern, combination_table


def by_argsort(weight: Tensor, n: int, m: int) -> Tensor:
    """Sort every group, scatter zeros: what all three papers' code does."""
    groups = weight.abs().reshape(-1, m)
    smallest = groups.argsort(dim=1)[:, : m - n]
    return torch.ones_like(groups).scatter_(1, smallest, 0.0).reshape(weight.shape)


def by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    """The same with topk."""
    groups = weight.abs().reshape(-1, m)
    return torch.zeros_like(groups).scatter_(1, groups.topk(n, dim=1).indices, 1.0).reshape(weight.shape)


def by_enumeration(weight: Tensor, n: int, m: int) -> Tensor:
    """Weigh all combinations by a matrix product: what apex and torchao do."""
    table = combination_table(Pattern(n, m)).float()
    groups = weight.abs().reshape(-1, m)
    return table[(groups @ table.T).argmax(dim=1)].reshape(weight.shape)


WAYS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "argsort": by_argsort, "topk": by_topk, "enumeration": by_enumeration,
}  # fmt: skip
