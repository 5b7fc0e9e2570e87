"""cuSPARSELt's C functions, as torch has them in the process, for versions whose interface is known.

Known are 0.6 to 0.8: the headers of 0.6.3, 0.7.1 and 0.8.0 agree in every function and number that this package uses, and
differ in what their opaque structs take (13,072, 1,024 and 512 bytes) and in one function that came later (`LATER`).
The version has to be torch's own as well, because torch's library packs the weights.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from ctypes import c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

NAME = "libcusparseLt.so.0"
KNOWN = range(600, 900)
"""Versions, as 10000 major + 100 minor + patch."""
STATUS = (
    "SUCCESS", "NOT_INITIALIZED", "ALLOC_FAILED", "INVALID_VALUE", "ARCH_MISMATCH", "MAPPING_ERROR", "EXECUTION_FAILED",
    "INTERNAL_ERROR", "MATRIX_TYPE_NOT_SUPPORTED", "ZERO_PIVOT", "NOT_SUPPORTED", "INSUFFICIENT_RESOURCES",
)  # fmt: skip
P = c_void_p  # a struct, a number that an attribute is set to, or memory of the device
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cusparseLtInit": (P,),
    "cusparseLtDestroy": (P,),
    "cusparseLtDenseDescriptorInit": (P, P, c_int64, c_int64, c_int64, c_uint32, c_int, c_int),
    "cusparseLtStructuredDescriptorInit": (P, P, c_int64, c_int64, c_int64, c_uint32, c_int, c_int, c_int),
    "cusparseLtMatDescriptorDestroy": (P,),
    "cusparseLtMatmulDescriptorInit": (P, P, c_int, c_int, P, P, P, P, c_int),
    "cusparseLtMatmulDescSetAttribute": (P, P, c_int, P, c_size_t),
    "cusparseLtMatmulAlgSelectionInit": (P, P, P, c_int),
    "cusparseLtMatmulAlgSetAttribute": (P, P, c_int, P, c_size_t),
    "cusparseLtMatmulAlgGetAttribute": (P, P, c_int, P, c_size_t),
    "cusparseLtMatmulPlanInit": (P, P, P, P),
    "cusparseLtMatmulPlanDestroy": (P,),
    "cusparseLtMatmulGetWorkspace": (P, P, P),
    "cusparseLtMatmul": (P, P, P, P, P, P, P, P, P, P, c_int32),
}
LATER = {"cusparseLtMatmulAlgSelectionDestroy": (P,)}


class Refused(Exception):
    """A status other than success. str: the call and the status' name."""


class Library:
    """functions: with the attributes of `PROTOTYPES`, each of which returns a status; version: as in `KNOWN`."""

    def __init__(self, functions: Any, version: int) -> None:
        self.functions, self.version = functions, version
        self.struct = 4096 if version >= 700 else 16384  # bytes, ample for each of the opaque structs

    def call(self, name: str, *given: int) -> None:
        """Call a function; structs and pointers are addresses. Raises `Refused`."""
        status = getattr(self.functions, name)(*given)
        if status:
            raise self.refused(name, status)

    def drop(self, name: str, address: int) -> None:
        """Call a function that destroys a struct, if this version has it. There is nothing to do if it fails."""
        destroy = getattr(self.functions, name, None)
        if destroy is not None:
            destroy(address)

    def refused(self, name: str, status: int) -> Refused:
        """The error of a status."""
        known = STATUS[status] if 0 <= status < len(STATUS) else str(status)
        return Refused(f"{name} of cuSPARSELt {self.version} says CUSPARSE_STATUS_{known}")


class Structs:
    """Zeroed memory for opaque structs, which stay where they are. addresses: one for each, multiples of 64."""

    def __init__(self, size: int, count: int) -> None:
        self._memory = ctypes.create_string_buffer(size * count + 64)
        first = -(-ctypes.addressof(self._memory) // 64) * 64
        self.addresses = tuple(range(first, first + size * count, size))


@cache
def found() -> Library | None:
    """The library that torch multiplies with; None where torch has none, it is not found, or its version is not known."""
    if torch.version.cuda is None or not torch.backends.cusparselt.is_available():
        return None
    for place in (NAME, *_beside_torch()):
        library = opened(place)
        if library is not None and library.version == torch.backends.cusparselt.version():
            return library
    return None


def opened(place: str) -> Library | None:
    """The library of a file or a name; None if it cannot be loaded, or its version is not known."""
    try:
        functions = ctypes.CDLL(place)
        version = _version(functions)
        if version not in KNOWN:
            return None
        for name, arguments in {**PROTOTYPES, **LATER}.items():
            if name in PROTOTYPES or hasattr(functions, name):
                function = getattr(functions, name)
                function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError):  # no such file, or not the functions that we know
        return None
    return Library(functions, version)


def _version(functions: ctypes.CDLL) -> int:
    parts, value = [], c_int()
    for which in range(3):  # major, minor, patch; needs no handle, so no GPU
        if functions.cusparseLtGetProperty(c_int(which), ctypes.byref(value)):
            return 0
        parts.append(value.value)
    return parts[0] * 10000 + parts[1] * 100 + parts[2]


def _beside_torch() -> Iterator[str]:
    """Files of the packages that the CUDA wheels of torch depend on."""
    for package in ("nvidia.cusparselt", "cusparselt"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # of the parent
            continue
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield str(Path(folder) / "lib" / NAME)
