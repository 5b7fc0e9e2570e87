"""From words on the command line to a model and its inputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError


def model_of(name: str) -> nn.Module:
    """The model that ``module:factory`` names: a function without arguments that returns it, or the model itself.

    Modules are looked for in the working directory first. Raises NMError.
    """
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise NMError(f"{name!r} is not MODULE:FACTORY, for instance mypackage.models:load")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for atom in path.split("."):
            found = getattr(found, atom)
    except (ImportError, AttributeError) as error:
        raise NMError(
            f"{name} cannot be found: {error}. MODULE is looked for in the working directory ({os.getcwd()}) and among "
            "what is installed; FACTORY is a function in it, or a model"
        ) from error
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise NMError(f"{name}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise NMError(f"{name} gives {type(found).__name__}, not a torch.nn.Module: name a function that returns the model")
    return found


def example_inputs(shapes: Sequence[str], model: nn.Module) -> tuple[Tensor, ...]:
    """Random tensors of ``shapes``, ``1x3x224x224`` or ``1x128:int64``, on the model's device in its dtype. Raises NMError."""
    parameter = next(model.parameters(), torch.zeros(()))
    made = []
    for text in shapes:
        sizes, _, kind = text.partition(":")
        dtype = getattr(torch, kind, None) if kind else parameter.dtype
        if not isinstance(dtype, torch.dtype):
            raise NMError(f"{text!r}: {kind!r} is no dtype of torch; say int64, float16, ...")
        try:
            shape = [int(size) for size in sizes.lower().split("x")]
        except ValueError as error:
            raise NMError(f"{text!r} is not a shape: sizes with an x between them, such as 1x3x224x224") from error
        if dtype.is_floating_point:
            made.append(torch.randn(shape, device=parameter.device).to(dtype))
        else:
            made.append(torch.zeros(shape, device=parameter.device, dtype=dtype))  # an index that is always there
    return tuple(made)
