"""``len(x)`` of a tensor is a size like any other while a model is captured.

batch = len(x)      # Python wants a plain number of `len`, and torch.export then holds the batch at that of the example
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor


@contextlib.contextmanager
def lengths_as_sizes() -> Iterator[None]:
    """Inside, the length of a tensor whose first axis is dynamic is ``x.shape[0]``."""
    plain = builtins.len

    def length(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and not isinstance(value.shape[0], int):
            return value.shape[0]
        return plain(value)

    with patch.object(builtins, "len", length):
        yield
