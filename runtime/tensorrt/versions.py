"""Torch-TensorRT, imported when it is needed: which version goes with which torch, and what to type where it is not there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import sys
from types import ModuleType

import torch

from nm_compiler.errors import NMError
from nm_compiler.wording import first_line

# torch -> torch_tensorrt, TensorRT: the pins in the metadata of the torch-tensorrt wheels on PyPI.
MATCHING = {
    "2.11": ("2.11.0", "10.15"),
    "2.12": ("2.12.1", "10.16"),
    "2.13": ("2.13.0", "11.0"),
    "2.14": ("2.14.0", "11.1"),
}
INDEX = "https://pypi.nvidia.com"  # NVIDIA's own index: PyPI holds TensorRT's stubs, the libraries lie there


def import_torch_tensorrt() -> ModuleType:
    """``import torch_tensorrt``, checked against the torch that runs.

    Raises NMError with the command to type if it is missing, made for another torch, or cannot load TensorRT's libraries.
    """
    loaded = sys.modules.get("torch_tensorrt")
    if loaded is not None:
        _check(str(getattr(loaded, "__version__", "")))
        return loaded
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise NMError(f"the tensorrt backend needs torch_tensorrt, which is not installed. {advice()}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # built from source, without metadata
        _check(importlib.metadata.version("torch-tensorrt"))
    printed = io.StringIO()  # torch_tensorrt prints why it cannot be imported, and raises a bare Exception
    try:
        with contextlib.redirect_stdout(printed):
            return importlib.import_module("torch_tensorrt")
    except Exception as error:
        raise NMError(_why(error)) from error


def advice(version: str | None = None) -> str:
    """What goes with the torch of ``version`` (the installed one if left out), and the command that installs it."""
    version = torch.__version__ if version is None else version
    found = MATCHING.get(_minor(version))
    if found is None:
        known = ", ".join(MATCHING)
        return (
            f"No torch_tensorrt is known to go with torch {version}: install one of torch {known}, or, if a torch_tensorrt "
            f"{_minor(version)} has been released since, pip install 'torch-tensorrt=={_minor(version)}.*' "
            f"--extra-index-url {INDEX}"
        )
    ours, theirs = found
    return (
        f"With torch {version} go torch_tensorrt {ours} and TensorRT {theirs}: "
        f"pip install torch-tensorrt=={ours} --extra-index-url {INDEX}"
    )


def _check(version: str) -> None:
    if version and _minor(version) != _minor(torch.__version__):
        raise NMError(
            f"torch_tensorrt {version} is installed beside torch {torch.__version__}; its minor version has to be torch's. "
            f"{advice()}"
        )


def _why(error: Exception) -> str:
    said = first_line(error)
    if "nvinfer" in said or "tensorrt" in said.lower():
        return f"torch_tensorrt cannot load TensorRT's libraries ({said}). {advice()}"
    if "cuda" in said.lower() or "nvidia" in said.lower():
        return (
            f"torch_tensorrt needs an NVIDIA GPU and a CUDA build of torch, and this is torch {torch.__version__} ({said}). "
            'Lower on the machine that has the GPU, or take backend="onnx" here'
        )
    return f"torch_tensorrt cannot be imported ({said}). {advice()}"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
