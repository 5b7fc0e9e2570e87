"""A frozen program becomes an ONNX file whose constants hold the zeros where a runtime looks for them.

    program --torch.onnx.export--> ops --fold_moves--> weights are constants of their products --optimise--> temporary file
            --checker, zeros read back from the file, onnxruntime against the program--> the file at its place

Convolutions hold N:M weights along axis 1, linears become MatMul with a ``[K, N]`` constant, N:M along axis 0, or Gemm with a
``[N, K]`` one (transB), N:M along axis 1: the reduction axis each time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram

from nm_compiler.errors import NMError, Refusal
from nm_compiler.memory import give_back
from nm_compiler.runtime.onnx_files.dtypes import match_dtypes
from nm_compiler.runtime.onnx_files.folding import fold_moves
from nm_compiler.runtime.onnx_files.found import SparseConstant, planned_constants
from nm_compiler.runtime.onnx_files.later import compute_later, plain
from nm_compiler.runtime.onnx_files.naming import name_after_parameters, name_outputs
from nm_compiler.runtime.onnx_files.numerics import Numerics, compare, placeholders, precision
from nm_compiler.runtime.onnx_files.packages import require
from nm_compiler.runtime.onnx_files.reading import load
from nm_compiler.runtime.onnx_files.saving import Staged
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.check import worst_group
from nm_compiler.wording import dtype_name, first_line

ONE_FILE = 2**31 - 2**26  # protobuf ends at 2 GiB; the graph needs some of it
_NOISY = ("onnxscript", "onnx_ir", "torch.onnx")


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the file. shape: a name where a size is dynamic; example: the shape it was checked with."""

    name: str
    shape: tuple[int | str, ...]
    example: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What `write` wrote and what it found in the file afterwards. ``print`` it.

    weights: planned weights that are constants of products, read back from the file; refusals: planned weights that are
    not, and why; data: the file beside it that holds the weights, if they did not fit into one.
    """

    path: Path
    dtype: str
    opset: int
    inputs: tuple[Input, ...]
    weights: tuple[SparseConstant, ...]
    refusals: tuple[Refusal, ...]
    numerics: Numerics
    data: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return {
            **{"file": self.path.name, "data": self.data and self.data.name, "dtype": self.dtype, "opset": self.opset},
            "inputs": [asdict(value) for value in self.inputs],
            "weights": [asdict(weight) for weight in self.weights],
            "refusals": [{"where": refusal.where, "reason": refusal.reason} for refusal in self.refusals],
            "numerics": asdict(self.numerics),
        }

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.dtype}, opset {self.opset}): {len(self.weights)} sparse constants"]
        lines += [f"  {w.name} {list(w.shape)}: {w.pattern} along axis {w.axis} of {w.op}" for w in self.weights]
        return "\n".join([*lines, *(f"  {refusal}" for refusal in self.refusals), str(self.numerics)])


def write(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    path: str | os.PathLike[str],
    *,
    sites: Mapping[str, Site],
    outputs: Sequence[str] = (),
    report: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    one_file: int = ONE_FILE,
) -> Written:
    """Write ``program``, already frozen and cast, to ``path``, and ``<path>.json`` beside it.

    inputs: positional, as the program was exported with; axes that are dynamic there stay dynamic in the file.
    sites: the planned weights by the name that the program has them under: of a parameter, a buffer, or a constant such as
    ``conv1_weight_folded``. In the file they are called what the sites are.
    outputs: what they are called in the file, as of `nm_compiler.runtime.onnx_files.naming.output_names`.
    report: plain values for the sidecar, which holds ``{"onnx": Written.to_dict(), "report": report}``.
    tolerance: of the comparison with onnxruntime on CPU; None is 1e-5 relative for float32, 5e-3 for float16.
    one_file: bytes of weights above which they go into a data file beside the model.

    The old file stays as it was until the new one is written and checked. Raises NMError, nothing changed, if a package is
    missing, a weight is not N:M, the exporter does not know an op, or the file is not valid or computes something else.
    """
    require("onnx", "onnxscript", "onnxruntime", why="an ONNX file")
    _check_zeros(program, sites)
    with Staged(Path(path)) as staged:
        model, origins = _exported(program, precision(program, inputs))
        name_after_parameters(model, sites, origins)
        name_outputs(model, outputs)
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
        staged.save(model, size, one_file)
        opset = model.opset_imports[""]
        del model  # it may hold the weights once more, turned
        gc.collect()  # so may what the exporter left behind, in cycles
        give_back()
        _check_valid(staged.outline)
        weights, refusals = planned_constants(staged.outline, program, sites, origins)
        written = Written(
            path=staged.path,
            dtype=dtype_name(precision(program, inputs)),
            opset=opset,
            inputs=_inputs(staged.outline, program, inputs),
            weights=weights,
            refusals=refusals,
            numerics=compare(program, inputs, staged.outline, tolerance),
            data=staged.data if staged.data.exists() else None,
        )
        sidecar = {"onnx": written.to_dict(), "report": dict(report) if report is not None else None}
        staged.commit(json.dumps(sidecar, indent=1) + "\n")
    return written


def _check_zeros(program: ExportedProgram, sites: Mapping[str, Site]) -> None:
    for name, site in sites.items():
        weight = program.state_dict.get(name, program.constants.get(name))
        if not isinstance(weight, Tensor):
            raise NMError(f"{name}: the program has no such weight; it was exported without it, or under another name")
        fullest = worst_group(weight, site.pattern.m, site.in_axis)
        if fullest > site.pattern.n:
            raise NMError(
                f"{name} of shape {list(weight.shape)} is not {site.pattern} along axis {site.in_axis}: a group has {fullest} "
                "non-zeros. Freeze the model first (nm.freeze), and do not train it afterwards"
            )


def _exported(program: ExportedProgram, dtype: torch.dtype) -> tuple[Any, dict[str, str]]:
    """The `onnx_ir.Model`, and the parameter that each constant with a name of its own comes from."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    opset = 22 if dtype == torch.bfloat16 else None  # the first opset whose Conv takes bfloat16
    try:
        with _quiet():
            with plain(program):
                exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=opset)
            assert exported is not None
            compute_later(exported.model, program)
            CommonSubexpressionEliminationPass()(exported.model)  # a weight used twice is moved once
            origins = fold_moves(exported.model)
            exported.optimize()
            match_dtypes(exported.model)
            origins = fold_moves(exported.model, origins)  # what the optimiser brought to light: the Split of a chunk
    except Exception as error:
        raise NMError(_why_not(error)) from error
    return exported.model, origins


def _why_not(error: BaseException) -> str:
    told = f"torch.onnx.export (torch {torch.__version__}) cannot write this program"
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w:.]+)'", str(error))
    if missing:
        return (
            f"{told}: it has no translation for {missing[1]}. Write that line of the model with other ops, or update "
            "torch and onnxscript"
        )
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{told}: {first_line(error)[:300]}. Update torch and onnxscript, or write that part of the model with other ops"


def _check_valid(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise NMError(
            f"what was exported is no valid ONNX model: {first_line(error)[:300]}. An op that does not take the dtype is "
            "exported in float32 or float16; otherwise write that part of the model with other ops"
        ) from error


def _inputs(path: Path, program: ExportedProgram, inputs: tuple[Tensor, ...]) -> tuple[Input, ...]:
    found, fakes = load(path).graph.input, placeholders(program)
    if not len(found) == len(fakes) == len(inputs):
        raise NMError(f"the program takes {len(fakes)} inputs, the file {len(found)}, {len(inputs)} were given")
    result = []
    for value, fake, example in zip(found, fakes, inputs, strict=True):
        shape = tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for axis, size in enumerate(fake.shape):
            if isinstance(size, SymInt) and not isinstance(shape[axis], str):
                raise NMError(f"input {value.name} of shape {list(shape)}: the exporter fixed axis {axis}, which is dynamic")
        result.append(Input(value.name, shape, tuple(example.shape)))
    return tuple(result)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what it skips; what matters comes back as an exception."""
    loggers = [(logger := logging.getLogger(name), logger.level) for name in _NOISY]
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
