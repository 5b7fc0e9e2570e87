"""Models made smaller without knowing them: of a row of equal blocks the first are enough.

    layers: [block, block, block, ... 32 times]   ->   layers: [block, block]

Two blocks are equal when they are of one class and their parameters have the same names and shapes. Whether the rest of
a model bears the cut is for a forward pass to say: models that count or index their blocks do not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby

import torch
from torch import nn

from zoo.entry import Built

KEPT = 2
LARGEST = 200_000_000
"""Parameters of a model that is measured whole; a larger one is cut, so that a benchmark fits into 24 GiB."""


def cut(model: nn.Module, kept: int = KEPT) -> nn.Module:
    """Leave ``kept`` of every row of equal blocks, in place."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            rows = [list(row) for _, row in groupby(enumerate(module), key=lambda pair: _shape(pair[1]))]
            for place, _ in reversed([pair for row in rows for pair in row[kept:]]):
                del module[place]
    return model


def within_bounds(model: nn.Module) -> nn.Module:
    """The model itself, or what is left of it when it is too large to be measured whole."""
    return cut(model) if sum(parameter.numel() for parameter in model.parameters()) > LARGEST else model


def first_that_runs(candidates: Sequence[Callable[[], Built]]) -> Built:
    """The first of ever larger variants of a model whose forward pass goes through; the last is not tried."""
    for candidate in candidates[:-1]:
        try:
            model, args, kwargs = candidate()
            with torch.no_grad():
                model.eval()(*args, **kwargs)
        except Exception:  # whatever a model says to a size that it was not made for
            continue
        return model.train(), args, kwargs
    return candidates[-1]()


def _shape(block: nn.Module) -> Hashable:
    """What makes blocks equal. Blocks without parameters are never dropped: each is its own kind."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return (type(block), shapes) if shapes else id(block)
