"""Numbers that Python draws in forward(): an exported graph holds those of its capture for good.

    if random.random() < self.drop: return x     this layer would run always from now on, or never
    mask = torch.from_numpy(np.random.rand(n))   and this be the same mask in every step

Export sees the value and not where it came from. So the capture of a model that is to train fails where training draws, and
that mode runs in TorchDynamo's fragments, which draw at every call. What evaluation draws, as to ignore it, is not asked.
"""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from nm_compiler.errors import NMError


class Drawn(RuntimeError):
    """An exported graph would hold this number for ever."""


@contextlib.contextmanager
def nothing_drawn(model: nn.Module) -> Iterator[None]:
    """Raises NMError afterwards if Python's or numpy's random numbers, or a generator that a layer keeps, have moved on.

    Its cause is `Drawn` where fragments draw as forward() does: of a `random.Random` TorchDynamo draws once, too.
    """
    before = _states(model)
    yield
    moved = next((name for name, state in _states(model).items() if name in before and before[name][1] != state[1]), None)
    if moved is None:
        return
    text = f"forward() of this {type(model).__name__} draws from {moved} in Python"
    if isinstance(before[moved][0], random.Random):
        raise NMError(
            f"{text}, a random.Random of its own, whose numbers torch.export and torch.compile draw once and keep: draw from "
            "the module random, or with torch"
        )
    raise NMError(f"{text}: one graph would hold the numbers of its capture for good. Draw them with torch") from Drawn(text)


def _states(model: nn.Module) -> dict[str, tuple[Any, bytes]]:
    generators: dict[str, Any] = {"random": random.getstate(), "numpy.random": np.random.get_state()}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
                generators[f"{path}.{name}".lstrip(".")] = value
    return {name: (value, pickle.dumps(value)) for name, value in generators.items()}
