"""The structure of an ONNX file, read from its bytes without the weights in between.

    file      ModelProto [ .. GraphProto [ nodes .. TensorProto [ name, shape, raw data ] .. ] .. ]
    outline   the same, but large raw data are external data: of this file, from byte to byte

Fields of protobuf messages say their length before their bytes, so what is large is stepped over; everything else is parsed
by protobuf itself. Ref: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

LARGE = 1 << 10  # bytes; smaller raw data stay
GRAPH, INITIALISER, RAW = 7, 5, 9  # fields of ModelProto, GraphProto and TensorProto
DELIMITED = 2  # the wire type of strings, bytes and messages
_FIXED = {1: 8, 5: 4}  # bytes of the wire types of fixed size


def outline(path: Path) -> Any:
    """The ModelProto at ``path``, its large initialisers as external data that lie in ``path`` itself.

    Raises OSError, and ValueError or protobuf's DecodeError for what is no ModelProto.
    """
    import onnx

    with path.open("rb") as file:
        rest, graphs = _split(file, os.fstat(file.fileno()).st_size, GRAPH)
        model = onnx.ModelProto.FromString(rest)
        for begin, end in graphs:
            file.seek(begin)
            rest, tensors = _split(file, end, INITIALISER)
            model.graph.MergeFromString(rest)
            model.graph.initializer.extend(_tensor(file, *span, path.name) for span in tensors)
    return model


def _tensor(file: BinaryIO, begin: int, end: int, name: str) -> Any:
    import onnx

    file.seek(begin)
    rest, data = _split(file, end, RAW)
    tensor = onnx.TensorProto.FromString(rest)
    for start, stop in data:
        if stop - start < LARGE:
            file.seek(start)
            tensor.raw_data = file.read(stop - start)
            continue
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", start), ("length", stop - start)):
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def _split(file: BinaryIO, end: int, wanted: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The message from here to ``end`` without its fields of number ``wanted``, and from where to where those reach."""
    rest, spans = bytearray(), list[tuple[int, int]]()
    for number, first, begin, stop in _fields(file, end):
        if number == wanted:
            spans.append((begin, stop))
        else:
            file.seek(first)
            rest += file.read(stop - first)
        file.seek(stop)
    return bytes(rest), spans


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, place of the tag, and from where to where the value reaches, of every field."""
    while (first := file.tell()) < end:
        number, kind = divmod(_varint(file), 8)
        if kind == DELIMITED:
            length = _varint(file)
        elif kind in _FIXED:
            length = _FIXED[kind]
        elif kind == 0:
            begin = file.tell()
            _varint(file)
            length = file.tell() - begin
            file.seek(begin)
        else:
            raise ValueError(f"wire type {kind}")
        begin = file.tell()
        if begin + length > end:
            raise ValueError("a field ends behind what holds it")
        yield number, first, begin, begin + length


def _varint(file: BinaryIO) -> int:
    """Seven bits a byte, low ones first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number without an end")
