"""Put a model in its place whole or not at all.

    model.onnx <- .model.<token>.onnx          renamed when everything is written and checked
    model.onnx.<token>.data                    weights above the limit of one file; no other version of the model names it
    model.onnx.json <- .model.<token>.json     the sidecar

Until the rename the old model and its data are as they were; what is left of a failed attempt is removed. Data files of
older versions are removed after the rename.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

from nm_compiler.errors import NMError
from nm_compiler.runtime.onnx_files.outline import outline
from nm_compiler.runtime.onnx_files.streaming import write_streamed


class Staged:
    """A model on its way to ``path``: `save` it, look at ``model``, then `commit`. Leaving the block undoes what was not.

    Raises NMError, before anything is written, if ``path`` cannot be a model file.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".onnx":
            raise NMError(f"{path}: an ONNX file is called something.onnx, readers go by the suffix")
        self.path = path.resolve()
        folder = self.path.parent
        if not folder.is_dir():
            raise NMError(f"{path}: the folder {folder} does not exist: make it first")
        if self.path.is_dir():
            raise NMError(f"{path} is a folder: name a file in it")
        token = secrets.token_hex(4)
        self.model = folder / f".{self.path.stem}.{token}.onnx"
        self.data = folder / f"{self.path.name}.{token}.data"
        self.sidecar = folder / f".{self.path.stem}.{token}.json"
        self.outline = folder / f".{self.path.stem}.{token}.outline.onnx"
        try:
            self.model.touch()
        except OSError as error:
            raise NMError(f"{path} cannot be written: {error.strerror}. Choose another folder") from error

    def save(self, model: Any, size: int, limit: int) -> None:
        """Write an `onnx_ir.Model` of ``size`` bytes of weights; above ``limit`` bytes they go to the data file.

        ``outline`` is then what `outline` reads back from it: the structure without the weights; it is never committed.
        """
        import onnx_ir

        try:
            if size > limit:
                onnx_ir.save(model, self.model, external_data=self.data.name)
            else:
                write_streamed(model, self.model)
            self.outline.write_bytes(outline(self.model).SerializeToString())
            for file in (self.model, self.data):
                _settle(file)
        except OSError as error:
            raise self._failed(error, size) from error

    def commit(self, text: str) -> None:
        """Rename everything into its place; text: of the sidecar."""
        try:
            self.sidecar.write_text(text)
            _settle(self.sidecar)
            self.model.replace(self.path)
            kept, self.data = self.data, self.model  # the model in its place names the data: it is not undone any more
            self.sidecar.replace(self.path.with_name(f"{self.path.name}.json"))
        except OSError as error:
            raise self._failed(error, len(text)) from error
        for old in self.path.parent.glob(f"{_literal(self.path.name)}.{'[0-9a-f]' * 8}.data"):
            if old != kept:
                old.unlink(missing_ok=True)

    def _failed(self, error: OSError, size: int) -> NMError:
        what = error.strerror or str(error)
        before = "; the file that was there is as it was" if self.path.exists() else ""
        return NMError(
            f"{self.path} cannot be written: {what}{before}. It needs {size:,} bytes beside what is there: make room, or "
            "choose another folder"
        )

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (self.model, self.data, self.sidecar, self.outline):
            file.unlink(missing_ok=True)


def _settle(file: Path) -> None:
    """Have the disk hold it before a name points to it, so that a power cut leaves the old file or the new one."""
    if file.exists():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
