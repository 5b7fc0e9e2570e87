"""Replace ops that only move a weight by the weight as they leave it.

    before                                         after
    fc.weight [N, K] -> Transpose -> MatMul        fc.weight [K, N] -> MatMul
    in_proj_weight   -> Split -> Transpose x 3     in_proj_weight/0, /1, /2 [K, N] -> MatMul x 3

A runtime looks for zeros in constants: what stands between a weight and its product hides them. The result keeps the
parameter's name, so that the file can be read, and checked, by the names of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nm_compiler.runtime.onnx_files.moves import is_move, moved


def fold_moves(model: Any, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Fold in an `onnx_ir.Model`, in place.

    Returns the name of the parameter that each new constant comes from, by its name; known: what an earlier call returned.
    """
    origins = dict(known or {})
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if is_move(node) and node.inputs else None
        if source is not None and source.name in graph.initializers and _is_weight(source):
            _fold(graph, node, origins)
    return origins


def _is_weight(value: Any) -> bool:
    return value.const_value is not None and len(value.const_value.shape) >= 2 and value.const_value.dtype.is_floating_point()


def _fold(graph: Any, node: Any, origins: dict[str, str]) -> None:
    import onnx_ir as ir

    tensors = [ir.convenience.get_const_tensor(value) for value in node.inputs if value is not None]
    if any(tensor is None for tensor in tensors) or any(value.is_graph_output() for value in node.outputs):
        return
    names = [value.name for value in node.inputs if value is not None]
    arrays = moved(ir.to_proto(node), {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
    source = node.inputs[0]
    first, dtype = source.name, source.const_value.dtype
    alone = len(source.uses()) == 1 and not source.is_graph_output()
    new = [(value, arrays[value.name]) for value in node.outputs if value.uses()]
    replacements = []
    for number, (value, array) in enumerate(new):
        name = first if alone and len(new) == 1 else f"{first}/{value.name if not alone else number}"
        tensor = ir.Tensor(array.copy(order="C"), dtype=dtype, name=name)
        constant = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        ir.convenience.replace_all_uses_with(value, constant)
        origins[name] = origins.get(first, first)
        replacements.append(constant)
    graph.remove(node, safe=True)
    if alone:
        del graph.initializers[first]
    for constant in replacements:
        graph.register_initializer(constant)
