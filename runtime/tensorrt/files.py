"""Save compiled modules with their engines, and load them: `torch_tensorrt.save` and `load`, with errors that say why."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.runtime.tensorrt.build import Built
from nm_compiler.runtime.tensorrt.log import LOGGER, listening
from nm_compiler.runtime.tensorrt.versions import import_torch_tensorrt

NOTE = "nm_compiler.json"  # beside the program, in the same file: the versions that made it


def save(built: Built, path: str | Path, **options: Any) -> Path:
    """Write the module and its engines to ``path`` (``.ep`` or ``.pt2``), with the versions that made them.

    options: further keywords of `torch_tensorrt.save`, for instance ``retrace``.
    Raises NMError, nothing written, if the folder does not exist or cannot be written to.
    """
    target = Path(path)
    check_writable(target.parent)
    torch_tensorrt = import_torch_tensorrt()
    extra = {**options.pop("extra_files", {}), NOTE: json.dumps(versions())}
    torch_tensorrt.save(
        built.module, str(target), arg_inputs=built.inputs, kwarg_inputs=dict(built.kwargs), extra_files=extra, **options
    )
    return target


def load(path: str | Path) -> nn.Module:
    """A module that was saved with `save`, ready to be called.

    Raises NMError if the file is missing or damaged, or holds an engine that this TensorRT cannot run.
    """
    source = Path(path)
    if not source.is_file():
        raise NMError(f"{source}: no such file")
    torch_tensorrt = import_torch_tensorrt()
    printed = io.StringIO()  # torch_tensorrt prints the cause, and then raises that this is no such file
    with (
        listening("torch_tensorrt._compile", logging.INFO) as heard,
        listening(LOGGER, logging.ERROR) as said,
        contextlib.redirect_stderr(printed),
    ):
        try:
            module: nn.Module = torch_tensorrt.load(str(source)).module()
        except Exception as error:
            causes = [record.exc_info[1] for record in heard if record.exc_info and record.exc_info[1]]
            lines = [record.getMessage() for record in said] + [str(cause) for cause in causes] + [str(error)]
            raise NMError(_why(source, lines)) from error
    return module


def check_writable(folder: Path) -> None:
    """Raise NMError if no file can be made in ``folder``; building an engine takes minutes, so this is asked first."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise NMError(
            f"{folder} cannot be written to ({error.strerror or error}): make it, or choose another folder"
        ) from error


def versions() -> dict[str, str]:
    """The versions that an engine depends on, and the GPU, as far as they can be found out."""
    found = {
        "torch": torch.__version__,
        "torch_tensorrt": str(getattr(import_torch_tensorrt(), "__version__", "")),
        "tensorrt": str(getattr(sys.modules.get("tensorrt"), "__version__", "")),  # torch_tensorrt has imported it
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    return {name: value for name, value in found.items() if value}


def _why(source: Path, lines: list[str]) -> str:
    then, now = _note(source), versions()
    differ = [name for name in now if name in then and then[name] != now[name]]
    said = next((line.strip().splitlines()[0] for line in lines if line.strip()), "no reason given")
    if differ:
        made = ", ".join(f"{name} {then[name]}" for name in differ)
        here = ", ".join(f"{name} {now[name]}" for name in differ)
        return (
            f"{source} was made with {made} and cannot be loaded with {here} ({said}). An engine runs on the TensorRT "
            "version and the kind of GPU that it was built with: lower the frozen model again here, or install those versions"
        )
    return f"{source} cannot be loaded ({said}). It is damaged, or not a file that nm_compiler or torch_tensorrt saved"


def _note(source: Path) -> Mapping[str, str]:
    """The versions that `save` noted in the file; empty if there are none."""
    with contextlib.suppress(OSError, zipfile.BadZipFile, ValueError), zipfile.ZipFile(source) as archive:
        name = next((name for name in archive.namelist() if Path(name).name == NOTE), None)
        if name is not None:
            found: dict[str, str] = json.loads(archive.read(name))
            return found
    return {}
