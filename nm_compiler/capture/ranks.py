"""What ``forward`` asks of torch.distributed: a graph holds the answers of its capture.

    if torch.distributed.is_initialized(): h = gather(h)        graph of before init_process_group: h

So what ranks have to do together (gathered features of a contrastive loss, statistics over all of a batch) would be left out
without a word, if the processes meet after `nm.compile` only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import torch

from nm_compiler.errors import NMError


@contextlib.contextmanager
def asked_alone() -> Iterator[list[str]]:
    """Gives the lines of models that ask for the group of processes in here, while there is none."""
    lines = list[str]()
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    kind = getattr(distributed, "_WorldMeta", None)  # whose WORLD all of them read: is_initialized, get_rank, ..
    if kind is None or torch.distributed.is_initialized():
        yield lines
        return
    own = kind.WORLD

    def read(cls: type) -> object:
        line = _line(sys._getframe(1))
        if line is not None and line not in lines:
            lines.append(line)
        return own.fget(cls)

    kind.WORLD = property(read, own.fset)
    try:
        yield lines
    finally:
        kind.WORLD = own


def asked(lines: Sequence[str]) -> NMError | None:
    """What to say, once there are several processes, of a model that asked for them in ``lines`` while there was one."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    return NMError(
        f"forward() asks torch.distributed for the other processes ({lines[0]}), and there were none when nm.compile captured "
        "it: the graph would leave out what it does with them. Call init_process_group before nm.compile, or say "
        "nm.compile(model), without inputs, and call the model after it"
    )


def _line(frame: FrameType | None) -> str | None:
    """The line of a model that asks, or None where torch or this library does for itself."""
    while frame is not None and _module(frame).startswith("torch.distributed"):
        frame = frame.f_back
    if frame is None:
        return None
    name = _module(frame)
    own = name.split(".")[0] in ("torch", "nm_compiler") and not name.startswith("torch.nn.modules")  # SyncBatchNorm asks
    return None if own else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
