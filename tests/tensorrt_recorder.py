# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""A torch_tensorrt that notes what is asked of it."""

import logging
import sys
import types
import zipfile
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from nm_compiler.runtime.tensorrt.log import LOGGER


class Recorder:
    """A torch_tensorrt that notes what it is called with, and says what TensorRT would say."""

    def __init__(self, says: tuple[str, ...] = ()) -> None:
        self.calls: list[dict[str, Any]] = []
        self.says = says
        self.module = types.ModuleType("torch_tensorrt")
        self.module.__version__ = torch.__version__.split("+")[0]
        self.module.Input = lambda **kwargs: types.SimpleNamespace(**kwargs)
        self.module.dynamo = types.SimpleNamespace(compile=self.compile)
        self.module.save = self.save
        self.module.load = self.load

    def compile(
        self,
        exported_program: ExportedProgram,
        *,
        arg_inputs: Any = None,
        kwarg_inputs: Any = None,
        sparse_weights: bool = False,
        use_fp32_acc: bool = False,
        strip_engine_weights: bool = False,
        immutable_weights: bool = True,
        min_block_size: int = 5,
        attn_bias_is_causal: bool = True,
        cache_built_engines: bool = False,
        reuse_cached_engines: bool = False,
        engine_cache_dir: str = "",
        **kwargs: Any,
    ) -> nn.Module:
        called = {name: value for name, value in locals().items() if name not in ("self", "kwargs")}
        self.calls.append({**called, **kwargs})
        for line in self.says:
            logging.getLogger(LOGGER).debug(line)
        return exported_program.module()

    def save(self, module: nn.Module, file_path: str, *, extra_files: dict[str, str], **kwargs: Any) -> None:
        self.calls.append({"module": module, **kwargs})
        with zipfile.ZipFile(file_path, "w") as archive:
            for name, text in extra_files.items():
                archive.writestr(f"archive/extra/{name}", text)

    def load(self, file_path: str) -> ExportedProgram:
        """As torch_tensorrt does it: the cause goes to the log, the exception says something else."""
        try:
            raise RuntimeError("The engine plan file is not compatible with this version of TensorRT")
        except RuntimeError:
            logging.getLogger("torch_tensorrt._compile").info("failed", exc_info=True)
            sys.stderr.write("Traceback ...")
        raise ValueError(f"The file {file_path} doesn't correspond to a valid Torchscript module or ExportedProgram")
