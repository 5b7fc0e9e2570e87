"""The header of a .safetensors file: what lies where, checked before a byte of a tensor is read.

    8 bytes: length of the JSON, little endian | JSON: name -> dtype, shape, data_offsets | the tensors' bytes

Read with plain reads rather than through a memory map: mapped pages count as memory of the process.
Reference: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nm_compiler.errors import NMError

_LONGEST = 100_000_000  # bytes of JSON, as in the reference implementation
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16,
    "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The dtypes that can be masked."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: dtype as the file writes it, its bytes from ``begin`` to ``end`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A whole file. header: the bytes before the first tensor; entries: in the order of their bytes, without gaps."""

    path: Path
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.entries[-1].end if self.entries else len(self.header)


def read_tensor_file(path: Path) -> TensorFile:
    """Read and check a header. Raises NMError for a file that is missing, truncated, longer than it says, or no such file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _header(file, path, size)
    except FileNotFoundError as error:
        raise NMError(f"{path}: no such file") from error
    except OSError as error:
        raise NMError(f"{path} cannot be read: {error}") from error
    entries = tuple(sorted(_entries(path, header), key=lambda entry: (entry.begin, entry.end)))
    at = len(header)
    for entry in entries:
        if entry.begin != at:
            raise _damaged(path, f"{entry.name} begins at byte {entry.begin}, where {at} is expected")
        at = entry.end
    if at != size:
        kind = f"it is truncated, {at - size} bytes are missing" if at > size else f"{size - at} bytes follow the last tensor"
        raise _damaged(path, f"{size} bytes, the header describes {at}: {kind}")
    return TensorFile(path, header, entries)


def _header(file: BinaryIO, path: Path, size: int) -> bytes:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(_LONGEST, size - 8):
        raise _damaged(path, f"{size} bytes, which cannot hold the header that its first 8 bytes announce")
    return start + file.read(length)


def _entries(path: Path, header: bytes) -> list[Entry]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise _damaged(path, f"{twice!r} is listed twice in its header")
        return dict(pairs)

    try:
        described = json.loads(header[8:].decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(described, dict):
        raise _damaged(path, "its header is no JSON object")
    found = ((name, value) for name, value in described.items() if name != "__metadata__")
    return [_entry(path, name, value, len(header)) for name, value in found]


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise _damaged(path, f"its header describes {name} as {str(value)[:80]}, not as dtype, shape and data_offsets")
    bits = _BITS.get(dtype)
    if end < begin or (bits is not None and -(-math.prod(shape) * bits // 8) != end - begin):
        raise _damaged(path, f"{name}, {dtype} of shape {list(shape)}, cannot fill bytes {begin} to {end}")
    return Entry(name, dtype, shape, data + begin, data + end)


def _damaged(path: Path, why: str) -> NMError:
    return NMError(f"{path} is damaged or no .safetensors file: {why}. Download or save it again")
