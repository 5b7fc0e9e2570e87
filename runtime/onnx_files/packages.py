"""The packages of the ``onnx`` extra, imported only when an ONNX file is read or written."""

from __future__ import annotations

import importlib
from typing import Any

from nm_compiler.errors import NMError


def require(*names: str, why: str) -> list[Any]:
    """Import the modules called ``names``. why: what needs them, for the message.

    Raises NMError with the command that installs them.
    """
    found, missing = [], []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            missing.append(name.partition(".")[0])
    if missing:
        lacking = ", ".join(dict.fromkeys(missing))
        raise NMError(f"{why} also needs {lacking}: pip install 'nm_compiler[onnx]'")
    return found
