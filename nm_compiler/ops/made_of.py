"""What an op is made of, for torch.compile: torch operations, which fuse and lie in memory as their neighbours do.

    %y = nm.conv(%x, %v, %u, ..)          in a compiled graph          %y = aten.convolution(%x, %v, ..)

A compiled graph calls an opaque op with arguments in the strides that it was traced with, and fuses nothing with it: a
network of convolutions loses channels_last that way. AOTAutograd has taken the op's own gradient before it looks here, so
the gradient stays; eager calls, `torch.export` and `nm.show` see the op as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("nm", "IMPL")  # kept: the registrations live as long as this object


def made_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of the arguments of ``nm::name``, that returns what it returns, in plain torch."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(name, function, "CompositeImplicitAutograd")
        return function

    return register
