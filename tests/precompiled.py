"""Compiled tiny models without capturing the same class again and again: a copy of the first one, with weights of its own."""

from __future__ import annotations

import copy
import functools
from typing import Any

import models
import torch
from torch import nn

import nm_compiler as nm


def precompiled(model: nn.Module, method: nm.Method, **options: Any) -> tuple[nm.SparseModule, nn.Module]:
    """What ``nm.compile(model, example(model), method=method)`` returns and a model that is compiled, equal to ``model``.

    model: one of `models`, as its class makes it with ``options``, in any dtype. Loading a dense state_dict starts every
    method anew (test_loading.py), so the two are those of a fresh compilation.
    """
    dtype = next(p.dtype for p in model.parameters())
    sparse, its = copy.deepcopy(_captured(type(model).__name__, method, dtype, tuple(sorted(options.items()))))
    sparse.load_state_dict(model.state_dict())
    return sparse, its


@functools.cache
def _captured(kind: str, method: Any, dtype: Any, options: tuple[tuple[str, Any], ...]) -> tuple[nm.SparseModule, nn.Module]:
    with torch.random.fork_rng(devices=[]):  # whoever comes first draws what the others draw
        model = getattr(models, kind)(**dict(options)).to(dtype)
        x = models.example(model)
        return nm.compile(model, x.to(dtype) if x.is_floating_point() else x, method=method), model
