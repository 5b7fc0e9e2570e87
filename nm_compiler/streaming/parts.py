"""Tensors a few megabytes at a time: read, masked and written in parts of whole rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.streaming.tensor_file import FLOATING, Entry

PART = 1 << 18  # weights in hand at a time: they stay in a core's cache while they are masked


def read_part(file: FileIO, entry: Entry, begin: int, target: Tensor) -> None:
    """Fill ``target``, contiguous, with a tensor's bytes, from its own byte ``begin`` on. Raises NMError."""
    view, done = _bytes_of(target), 0
    try:
        file.seek(entry.begin + begin)
        while done < len(view) and (got := file.readinto(view[done:])):
            done += got
    except OSError as error:
        raise NMError(f"{file.name}: {entry.name} cannot be read: {error}") from error
    if done != len(view):
        raise NMError(f"{file.name} ends inside {entry.name}: it has become shorter while it was read")


def parts(file: FileIO, entry: Entry, *, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """A floating tensor in slices of its first axis: (which, values). The values are overwritten by the next ones.

    multiple: the slices begin and end at multiples of it.
    """
    dtype, (rows, *rest) = FLOATING[entry.dtype], entry.shape
    row = math.prod(rest)
    step = max(1, PART // max(1, row * multiple)) * multiple
    space = torch.empty(min(step, rows), *rest, dtype=dtype)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        read_part(file, entry, begin * row * dtype.itemsize, space[:count])
        yield slice(begin, begin + count), space[:count]


def read_whole(path: Path, entry: Entry) -> Tensor:
    """A floating tensor as one. Raises NMError."""
    found = torch.empty(entry.shape, dtype=FLOATING[entry.dtype])
    with path.open("rb", buffering=0) as file:
        if found.numel():
            read_part(file, entry, 0, found)
    return found


def copy_bytes(source: FileIO, entry: Entry, target: BinaryIO) -> None:
    """A tensor as it is, of whatever dtype."""
    space = torch.empty(min(2 * PART, entry.nbytes), dtype=torch.uint8)
    for begin in range(0, entry.nbytes, 2 * PART):
        piece = space[: entry.nbytes - begin]
        read_part(source, entry, begin, piece)
        write_tensor(target, piece)


def write_tensor(target: BinaryIO, values: Tensor) -> None:
    """Write the bytes of a contiguous tensor."""
    target.write(_bytes_of(values))


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
