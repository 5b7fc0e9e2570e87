"""Regions of ``with torch.autocast`` in a fragment of TorchDynamo, entered while the fragment is traced once more.

    %r = _enter_autocast("cpu", bf16, True, True)           %r = _enter_autocast("cpu", bf16, True, True)
    %y : bf16 = linear(%x, %w)                       ->     %y : bf16 = aten.linear(%x, %w)     not f32
    _exit_autocast(%r)                                      _exit_autocast(%r)

Under a pre-dispatch tracer these two functions are noted and do nothing: values between them would have the dtypes of no
region, and an op that wants one dtype of all its inputs would fail, where TorchDynamo has put in what the model said of the
dtype of another (``torch.zeros(..., dtype=y.dtype)`` as a mask). A ``with torch.autocast`` is entered there, and noted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

Region = tuple[Any, ...]  # what torch.autocast is told: device, dtype, enabled, cache_enabled


class Regions:
    """Those that are open now, outermost first. As a context it leaves those that are open when an op fails."""

    def __init__(self) -> None:
        self._open: list[tuple[Region, torch.autocast]] = []

    @property
    def open(self) -> tuple[Region, ...]:
        """What each was told."""
        return tuple(told for told, _ in self._open)

    def enter(self, told: Sequence[Any]) -> torch.autocast:
        """Open one more."""
        region = torch.autocast(*told)
        region.__enter__()
        self._open.append((tuple(told), region))
        return region

    def leave(self) -> None:
        """Close the innermost one."""
        _, region = self._open.pop()
        region.__exit__(None, None, None)

    def __enter__(self) -> Regions:
        return self

    def __exit__(self, *error: object) -> None:
        while self._open:
            self.leave()


@contextlib.contextmanager
def under(told: Sequence[Region]) -> Iterator[None]:
    """All of the regions, one in another."""
    with Regions() as regions:
        for each in told:
            regions.enter(each)
        yield
