"""What callers read of a model beside calling it: `config`, sizes, names. A lowered model answers with them as well."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def facts(model: nn.Module) -> dict[str, Any]:
    """The public attributes of ``model`` and its class that are plain values, and its ``config`` whatever that is.

    No tensors, layers or methods, nor what a property computes: nothing here keeps memory of the model alive.
    """
    # layers, parameters and buffers are no attributes of their own: the model itself, which is not plain, stands for them
    found = {name: inspect.getattr_static(model, name, model) for name in dir(model) if not name.startswith("_")}
    plain = {name: value for name, value in found.items() if _is_plain(value)}
    config = getattr(model, "config", None)
    kept = config is None or callable(config) or isinstance(config, (nn.Module, torch.Tensor))
    return plain if kept else {**plain, "config": config}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple, set, frozenset)) else isinstance(value, _PLAIN)
