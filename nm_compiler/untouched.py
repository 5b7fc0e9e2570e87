"""A weight that is handed to a user's function to be read: what the function writes to it is an error, not another model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nm_compiler.errors import NMError


@contextmanager
def untouched(weight: Tensor, name: str, who: str, instead: str) -> Iterator[None]:
    """Raise NMError, the weight put back, if it is written to within. name: of it; who: writes; instead: what to do."""
    if weight.is_meta or weight.is_inference():  # no values, or none that can be written to
        yield
        return
    before, version = weight.detach().clone(), weight._version
    yield
    if weight._version != version:
        with torch.no_grad():
            weight.copy_(before)
        raise NMError(f"{who} writes to {name} of shape {list(weight.shape)}, which it is given to read: {instead}")
