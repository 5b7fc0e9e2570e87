"""The constants of an ONNX file that products multiply data with, and the axis along which each product reduces.

    Conv(x, w)      w [out, in / groups, *taps]   reduces along axis 1
    MatMul(x, w)    w [..., K, N]                 along the last but one (on the left of a product: along the last)
    Gemm(x, w)      w [K, N], or [N, K] if transB along axis 0, or 1 (on the left: the other way round, by transA)

A constant is an initialiser, inside the file or in an external data file beside it, or a Constant node, also behind ops
that only move it (see `nm_compiler.runtime.onnx_files.moves`). Bodies of If, Loop and Scan and local functions are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nm_compiler.errors import NMError
from nm_compiler.runtime.onnx_files.moves import is_move, moved
from nm_compiler.runtime.onnx_files.outline import outline
from nm_compiler.runtime.onnx_files.packages import require


@dataclass(frozen=True, slots=True)
class Operand:
    """A constant as a product reads it.

    name: of the initialiser it comes from; op: Conv, MatMul or Gemm; value: float array of two or more axes; axis: of
    value, along which the product reduces; moved: whether the file moves or cuts the initialiser before the product.
    """

    name: str
    op: str
    value: np.ndarray
    axis: int
    moved: bool


def load(path: Path) -> Any:
    """The ModelProto at ``path`` without its external data, large initialisers of its own counted among those.

    Raises NMError if the file is missing or damaged.
    """
    _, inliner = require("onnx", "onnx.inliner", why=f"reading {path}")
    if not path.is_file():
        raise NMError(f"{path}: no such file")
    try:
        model = outline(path)
        if model.functions:
            model = inliner.inline_local_functions(model)
    except Exception as error:
        raise NMError(f"{path} ({path.stat().st_size} bytes) is no ONNX model, or a damaged one: export it again") from error
    if not model.HasField("graph") or not model.opset_import:
        raise NMError(f"{path} ({path.stat().st_size} bytes) is no ONNX model, or a damaged one: export it again")
    return model


def operands(path: Path) -> Iterator[Operand]:
    """Every constant operand of the file at ``path``, one at a time, in the order of the graph.

    A constant that several products read comes once for each. Raises NMError if the file or its data cannot be read.
    """
    yield from _Reader(path).of_graph(load(path).graph, {})


class _Reader:
    """One walk over a file: what is constant at each point, by the name of the value."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of_graph(self, graph: Any, outer: dict[str, _Constant]) -> Iterator[Operand]:
        known = dict(outer)
        known |= {tensor.name: _Constant(tensor.name, tensor) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                known[node.output[0]] = _Constant(node.output[0], node.attribute[0].t)
            elif is_move(node) and all(name in known for name in node.input if name):
                sources = tuple(known[name] for name in node.input if name)
                known |= {name: _Constant(sources[0].name, node, name, sources) for name in node.output if name}
            else:
                yield from self._of_node(node, known)
            for attribute in node.attribute:
                for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    yield from self.of_graph(body, known)

    def _of_node(self, node: Any, known: dict[str, _Constant]) -> Iterator[Operand]:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "MatMul", "Gemm"):
            return
        constant = [name in known for name in node.input[:2]]
        if all(constant):  # weights multiplied with weights
            return
        for side in (0, 1):
            if constant[side] and not (node.op_type == "Conv" and side == 0):
                source = known[node.input[side]]
                value = self.value(source)
                if value.ndim >= 2 and value.dtype.kind not in "biu":
                    axis = _axis(node, side, value.ndim)
                    yield Operand(source.name, node.op_type, value, axis, isinstance(source.sources, tuple))

    def value(self, constant: _Constant) -> np.ndarray:
        if constant.sources is None:
            return self._array(constant.holder)
        inputs = [name for name in constant.holder.input if name]
        values = {name: self.value(source) for name, source in zip(inputs, constant.sources, strict=True)}
        return moved(constant.holder, values)[constant.output]

    def _array(self, tensor: Any) -> np.ndarray:
        from onnx import TensorProto, external_data_helper, numpy_helper

        outside = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
        try:
            found = None if outside is None else _mapped(tensor, self.path.parent / outside)
            if found is not None:
                return found
            if outside is not None:
                copy = TensorProto()
                copy.CopyFrom(tensor)
                external_data_helper.load_external_data_for_tensor(copy, str(self.path.parent))
                tensor = copy
            return np.asarray(numpy_helper.to_array(tensor))
        except Exception as error:
            where = f"{tensor.name} of shape {list(tensor.dims)}"
            if outside in (None, self.path.name):
                raise NMError(f"{self.path}: {where} cannot be read, the file is damaged: export it again") from error
            raise NMError(
                f"{self.path}: {where} cannot be read from {outside!r}, the data file that belongs beside the model: "
                "copy both files together, or export again"
            ) from error


def _mapped(tensor: Any, path: Path) -> np.ndarray | None:
    """The data of a tensor in the file at ``path``, read from the disk when it is looked at; None where onnx has to read it.

    It lies in memory no longer than the array is held, and only as far as it is read.
    """
    from onnx import helper

    told = {entry.key: entry.value for entry in tensor.external_data}
    beside = "/" not in told["location"] and "\\" not in told["location"] and not path.is_symlink() and path.is_file()
    if not beside or "length" not in told:
        return None
    shape, dtype = tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if int(told["length"]) != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or not int(told["length"]):
        return None
    data = np.memmap(path, np.uint8, "c", int(told.get("offset", 0)), int(told["length"]))
    found: np.ndarray = np.asarray(data).view(dtype).reshape(shape)
    return found


@dataclass(frozen=True, slots=True)
class _Constant:
    """Where a constant comes from. holder: a TensorProto, or with ``sources`` the NodeProto that moves them."""

    name: str
    holder: Any
    output: str = ""
    sources: tuple[_Constant, ...] | None = None


def _axis(node: Any, side: int, ndim: int) -> int:
    if node.op_type == "Conv":
        return 1
    if node.op_type == "MatMul":
        return ndim - 2 if side else ndim - 1
    transposed = any(a.name == ("transB" if side else "transA") and a.i for a in node.attribute)
    return int(transposed) if side else 1 - int(transposed)
