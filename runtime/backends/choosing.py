"""From a name to a backend; "auto" takes the first that works here, and says why not those before it."""

from __future__ import annotations

import torch

from nm_compiler.errors import NMError
from nm_compiler.runtime.backends.base import Backend
from nm_compiler.runtime.backends.dense import Dense
from nm_compiler.wording import dtype_name

NAMES = ("auto", "tensorrt", "cusparselt", "cpu", "onnx", "dense")


def choose_backend(name: str, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend called ``name``. dtype, device: of the model as it will be lowered.

    Raises NMError for an unknown name, and for a backend that was asked for and cannot work here.
    """
    if name == "auto":
        return _auto(dtype, device)
    if name not in NAMES:
        raise NMError(f"backend={name!r}: choose one of {', '.join(NAMES)}")
    backend = _made(name)
    missing = backend.missing(dtype, device)
    if missing:
        raise NMError(f"backend={name!r} cannot be used here: {missing}")
    return backend


def _auto(dtype: torch.dtype, device: torch.device) -> Backend:
    refused: list[str] = []
    for name in ("tensorrt", "cusparselt") if device.type != "cpu" else ("cpu",):
        backend = _made(name)
        missing = backend.missing(dtype, device)
        if missing is None:
            backend.notes = tuple(refused)
            return backend
        refused.append(f"{name}: {missing}")
    chosen = Dense(_short(dtype, device), _hint(device))
    chosen.notes = tuple(f"Not used, {reason}" for reason in refused)
    return chosen


def _short(dtype: torch.dtype, device: torch.device) -> str:
    if device.type == "cpu":
        return "no CPU kernels here"
    if device.type != "cuda":
        return f"no sparse kernels for {device.type} in this release"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype_name(dtype)}: sparse kernels need float16 or bfloat16"
    return "neither TensorRT nor cuSPARSELt works here"


def _hint(device: torch.device) -> str:
    if device.type == "cpu":
        return "what the notes say about the CPU kernels, or an NVIDIA GPU"
    return "an NVIDIA GPU, and dtype=torch.float16 or bfloat16"


def _made(name: str) -> Backend:
    """A backend by name; its file is imported only when it is wanted."""
    if name == "onnx":
        from nm_compiler.runtime.backends.onnx import Onnx

        return Onnx()
    if name == "tensorrt":
        from nm_compiler.runtime.backends.tensorrt import TensorRT

        return TensorRT()
    if name == "cusparselt":
        from nm_compiler.runtime.backends.cusparselt import CuSPARSELt

        return CuSPARSELt()
    if name == "cpu":
        from nm_compiler.runtime.backends.cpu import Cpu

        return Cpu()
    return Dense()
