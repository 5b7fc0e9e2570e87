"""Write an ONNX file whose weights go from where they lie to the disk: no copy of the model in memory.

    ModelProto   = header, graph
    GraphProto   = nodes and the rest, initialisers
    TensorProto  = name, type and shape, raw data

Protobuf writes the length of each of them before its bytes, and lets fields come in any order. So the small parts are
serialised by onnx itself, and the raw data, whose lengths are known, are written behind them, one tensor at a time.
Ref: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nm_compiler.runtime.onnx_files.outline import DELIMITED, GRAPH, INITIALISER, LARGE, RAW


def write_streamed(model: Any, path: Path) -> None:
    """Write an `onnx_ir.Model` to ``path``. Raises OSError."""
    import onnx

    large = {name: value for name, value in model.graph.initializers.items() if _is_large(value.const_value)}
    proto = _without_data(model, large, path)
    initialisers = {tensor.name: tensor for tensor in proto.graph.initializer}
    small, header = onnx.GraphProto(), onnx.ModelProto()
    small.CopyFrom(proto.graph)
    header.CopyFrom(proto)
    header.ClearField("graph")
    del small.initializer[:]
    small.initializer.extend(tensor for name, tensor in initialisers.items() if name not in large)
    heads = {name: _head(initialisers[name], value.const_value.nbytes) for name, value in large.items()}
    rest = small.SerializeToString()
    sizes = {name: len(head) + large[name].const_value.nbytes for name, head in heads.items()}
    length = len(rest) + sum(len(_prefix(INITIALISER, size)) + size for size in sizes.values())
    with path.open("wb") as file:
        file.write(header.SerializeToString() + _prefix(GRAPH, length) + rest)
        for name, value in large.items():
            file.write(_prefix(INITIALISER, sizes[name]) + heads[name])
            begin = file.tell()
            file.write(value.const_value.tobytes())
            assert file.tell() - begin == value.const_value.nbytes, f"{name} has another size than it says"


def _is_large(tensor: Any) -> bool:
    import onnx_ir as ir

    plain = not isinstance(tensor, (ir.ExternalTensor, ir.StringTensor, ir.TensorProtoTensor))
    return tensor is not None and plain and tensor.nbytes >= LARGE


def _without_data(model: Any, large: dict[str, Any], path: Path) -> Any:
    """The ModelProto with the data of ``large`` said to lie elsewhere."""
    import onnx_ir as ir

    held = {name: value.const_value for name, value in large.items()}
    try:
        for name, value in large.items():
            tensor = value.const_value
            value.const_value = ir.ExternalTensor(
                path.name, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=str(path.parent)
            )
        return ir.to_proto(model)
    finally:
        for name, tensor in held.items():
            large[name].const_value = tensor


def _head(tensor: Any, size: int) -> bytes:
    """A TensorProto up to its raw data."""
    import onnx

    told = onnx.TensorProto()
    told.CopyFrom(tensor)
    told.ClearField("external_data")
    told.ClearField("data_location")
    return bytes(told.SerializeToString()) + _prefix(RAW, size)


def _prefix(field: int, length: int) -> bytes:
    """The tag of a field and the length of what follows, each a varint: seven bits a byte, low ones first."""
    return _varint(field << 3 | DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
