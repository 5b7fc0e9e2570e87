"""Files that are there whole or not at all: written beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nm_compiler.errors import NMError

HALF = ".half"


@contextmanager
def whole(path: Path, *, check: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """A file to write to, which takes its place at ``path`` when the block ends, and is gone if it fails.

    check: called with the finished file before that; what it raises keeps the file from its place.
    Raises NMError where the system refuses to write, such as on a full disk.
    """
    half = path.with_name(f".{path.name}{HALF}")
    try:
        with half.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(half)
        half.replace(path)
    except OSError as error:
        if error.filename not in (None, str(half), str(path)):  # not of this file
            raise
        reason = error.strerror or error
        raise NMError(
            f"{path} could not be written ({reason}): nothing half-written is left. Make room or mend that, and run the same "
            "command again, it goes on with what is missing"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for half in folder.glob(f".*{HALF}"):
        half.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process. Raises NMError if another one has it; without effect where there is no flock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NMError(f"{folder}: another process is writing to it; wait for it, or give another folder") from error
        yield
    finally:
        os.close(handle)
