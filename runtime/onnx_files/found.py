"""What became of the planned weights of a program, read back from the bytes of its ONNX file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from nm_compiler.errors import NMError, Refusal
from nm_compiler.runtime.onnx_files.reading import load, operands
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.check import worst_group


@dataclass(frozen=True, slots=True)
class SparseConstant:
    """A planned weight as the file holds it: the product that reads it, its shape there, and the axis it is N:M along."""

    name: str
    op: str
    shape: tuple[int, ...]
    axis: int
    pattern: str


def planned_constants(
    path: Path, program: ExportedProgram, sites: Mapping[str, Site], origins: Mapping[str, str]
) -> tuple[tuple[SparseConstant, ...], tuple[Refusal, ...]]:
    """The planned weights as the products of the file at ``path`` read them, and those that none reads, with the reason.

    sites: by their names in the program; origins: those of constants that the file calls something else.
    Raises NMError if one is not N:M along the axis that its product reduces.
    """
    weights: dict[tuple[str, str], SparseConstant] = {}
    hidden: dict[str, str] = {}
    for operand in operands(path):
        origin = origins.get(operand.name, operand.name)
        site = sites.get(origin)
        if site is None:
            continue
        shape = tuple(operand.value.shape)
        if operand.moved:
            hidden[origin] = f"the file moves it before its {operand.op}, which hides its zeros"
            continue
        m = site.pattern.m
        if shape[operand.axis] % m or worst_group(_tensor(operand.value), m, operand.axis) > site.pattern.n:
            raise NMError(
                f"{site.name} became {operand.name} of shape {list(shape)}, which is not {site.pattern} along axis "
                f"{operand.axis}, where {operand.op} reduces: the exporter changed it. Update torch and onnxscript"
            )
        weights[operand.name, operand.op] = SparseConstant(operand.name, operand.op, shape, operand.axis, str(site.pattern))
    held: dict[str, list[SparseConstant]] = {name: [] for name in sites}
    for weight in weights.values():
        held[origins.get(weight.name, weight.name)].append(weight)
    sizes = {name: sum({w.name: math.prod(w.shape) for w in found}.values()) for name, found in held.items()}
    whole = [name for name, site in sites.items() if name not in hidden and sizes[name] >= math.prod(site.shape)]
    result, refusals = list(weights.values()), []
    for name in [name for name in sites if name not in whole]:
        alike = [other for other in whole if sites[other].layout == sites[name].layout and _equal(program, name, other)]
        if not alike:
            refusals.append(Refusal(sites[name].name, hidden.get(name) or _reader(path, sites[name].name)))
        else:
            result += [replace(w, name=sites[name].name, pattern=str(sites[name].pattern)) for w in held[alike[0]]]
    return tuple(result), tuple(refusals)


def _tensor(value: np.ndarray) -> Tensor:
    """As torch takes it, without a copy where it knows the dtype; else where it is not zero."""
    known = value.dtype in (np.float16, np.float32, np.float64)
    return torch.from_numpy(np.require(value, requirements="W") if known else value != 0)


def _equal(program: ExportedProgram, name: str, other: str) -> bool:
    """Whether two weights have the same values, as clones have before training: the optimiser keeps small ones once."""
    one, two = (program.state_dict.get(key, program.constants.get(key)) for key in (name, other))
    return isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)


def _reader(path: Path, name: str) -> str:
    readers = {node.op_type for node in load(path).graph.node if name in node.input}
    if readers:
        return f"the file reads it with {', '.join(sorted(readers))}, for which no runtime has N:M kernels"
    return "the file computes another constant from it: no Conv, MatMul or Gemm reads it as it is"
