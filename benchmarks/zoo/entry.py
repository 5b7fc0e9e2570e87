"""One model of the zoo: its name, where it comes from, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model with random weights, positional and keyword example inputs of batch 2."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that can be built, twice: at its own size, and small enough for a test.

    library: torchvision, timm, transformers or awkward; name: unique within it. ``build`` and ``small`` take nothing,
    so that a thousand entries cost nothing until one is built. outputs: the attribute of the model's output that
    matters (``"logits"``), None for all: what auxiliary outputs expose cannot be reordered.
    """

    library: str
    name: str
    build: Callable[[], Built]
    small: Callable[[], Built]
    outputs: str | None = None

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


def seeded(build: Callable[[], Built]) -> Built:
    """The same weights and inputs whenever and wherever a model is built; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()
