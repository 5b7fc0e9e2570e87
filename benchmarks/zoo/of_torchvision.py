"""All classification models of torchvision."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from zoo.entry import Built, Entry
from zoo.shim import declare_missing_operators
from zoo.shrink import cut, first_that_runs, within_bounds

SMALL = 64


def entries() -> list[Entry]:
    """One entry a model, at the smallest size that it has weights for."""
    declare_missing_operators()
    from torchvision import models

    return [Entry("torchvision", name, partial(_build, name), partial(_small, name)) for name in models.list_models(models)]


def _build(name: str) -> Built:
    return _with_images(within_bounds(_model(name)), _own_size(name))


def _small(name: str) -> Built:
    sizes = (SMALL, _own_size(name))
    return first_that_runs([lambda size=size: _with_images(cut(_model(name)), size) for size in sizes])  # type: ignore[misc]


def _model(name: str) -> nn.Module:
    from torchvision import models

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # their own default only warns
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _own_size(name: str) -> int:
    from torchvision import models

    return min(int(weights.transforms.keywords["crop_size"]) for weights in models.get_model_weights(name))


def _with_images(model: nn.Module, size: int) -> Built:
    return model, (torch.randn(2, 3, size, size),), {}
