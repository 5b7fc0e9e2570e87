"""A stand-in for TensorRT and for the calls to a GPU, so that Torch-TensorRT's own Python runs on a CPU.

Torch-TensorRT imports `tensorrt` and asks for a GPU as soon as it is imported, but its lowering passes, its table of
converters and its partitioner are plain Python over torch graphs. `install` puts a module called `tensorrt` in place whose
every name is a class that takes any arguments, and answers the four questions about the GPU. With ``dryrun=True``
Torch-TensorRT stops before it would build a network, so nothing here pretends to be an engine.

It changes `sys.modules` and `torch.cuda` for good: call it in a process of its own (`tensorrt_dryrun.py`).
"""

from __future__ import annotations

import enum
import importlib.machinery
import sys
import types
from typing import Any

import torch

VERSION = "11.0.0"


class _Name(type):
    """A class of which every attribute is another such class, made when it is first asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Name(name, (_Nothing,), {})
        setattr(cls, name, made)
        return made

    def __int__(cls) -> int:
        return 0

    def __index__(cls) -> int:
        return 0


class _Nothing(metaclass=_Name):
    """Takes any arguments and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Module(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tensorrt_rtx":  # that name would say that this is another product
            raise AttributeError(name)
        made = _Name(name, (_Nothing,), {})
        setattr(self, name, made)
        return made


def tensorrt() -> types.ModuleType:
    """The stand-in, with its inner module `tensorrt.tensorrt`."""
    module, inner = _Module("tensorrt"), _Module("tensorrt.tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None, is_package=True)
    module.__dict__.update(
        __version__=VERSION, __path__=[], __file__=__file__, __package__="tensorrt", __loader__=None, tensorrt=inner
    )
    # These names are looked at with isinstance, or listed: they have to be one and the same in both modules.
    shared: dict[str, Any] = {name: type(name, (), {}) for name in ("ITensor", "ILayer", "INetworkDefinition")}
    shared["DataType"] = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4 E8M0")
    module.__dict__.update(shared)
    inner.__dict__.update(shared)
    return module


def install() -> None:
    """Put the stand-in into `sys.modules`, and a GPU of compute capability 9.0 into `torch.cuda`. Before torch_tensorrt."""
    assert "torch_tensorrt" not in sys.modules  # nor does nm_compiler import it before it is needed
    module = tensorrt()
    sys.modules["tensorrt"], sys.modules["tensorrt.tensorrt"] = module, module.tensorrt
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_: (1 << 36, 1 << 36)
    torch.cuda.empty_cache = lambda: None
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C.__dict__["_CudaDeviceProperties"] = object
