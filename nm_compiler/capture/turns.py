"""Captures take turns: `torch.export` is not made for several threads at once, and each capture patches torch for its time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])
_TURN = threading.RLock()


def in_turn(function: _Function) -> _Function:
    """The same function, which waits while another thread is in one of these."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _TURN:
            return function(*args, **kwargs)

    return cast(_Function, called)
