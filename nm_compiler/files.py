"""Pages that the command line writes: whether there is a place for one is asked before the work, not after."""

from __future__ import annotations

from pathlib import Path

from nm_compiler.errors import NMError


def check_place(path: Path, option: str) -> None:
    """Raises NMError, in the words of the ``option`` that gave it, unless a file can be written at ``path``."""
    if path.is_dir():
        raise NMError(f"{option} {path} is a folder: name a file in it, such as {path / 'page.html'}")
    if not path.absolute().parent.is_dir():
        raise NMError(f"{option} {path}: the folder {path.absolute().parent} does not exist, make it first")


def write(path: Path, text: str, option: str) -> None:
    """Write a page. Raises NMError if that fails."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NMError(f"{option} {path} cannot be written: {error.strerror}") from error
