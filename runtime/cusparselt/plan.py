"""A plan of the library: everything that a product needs on the host, made once and launched often.

    D = act(alpha A B + bias)     A [out, in] packed, B = x^T [in, tokens], D [out, tokens] = y^T

The library takes B and writes D in rows or in columns; x or y in rows is the matrix that it calls in columns.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_size_t, c_void_p
from typing import Any, NamedTuple

import torch

from nm_compiler.errors import NMError
from nm_compiler.runtime.cusparselt.algorithm import Algorithm
from nm_compiler.runtime.cusparselt.library import Library, Refused, Structs

CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14, torch.int8: 3}
COMPUTE_32I, COMPUTE_32F = 0, 2
COLUMNS, ROWS = 1, 2  # orders of a matrix
AS_IS, TRANSPOSED = 0, 1
ALIGNMENT = 16
RELU, ALPHA_VECTOR, BIAS_POINTER = 0, 5, 8  # attributes of a product
CONFIG, CONFIGS, SPLIT, SPLIT_MODE = 0, 1, 3, 4  # attributes of a selection


class Problem(NamedTuple):
    """All that a plan depends on.

    dtype, result: of the operands and of y; tokens: a multiple of 8, or of 16 in 8 bits; columns: x lies in columns;
    rows: y is written in rows; algorithm: as in `nm_compiler.runtime.cusparselt.algorithm`; activation: "" or "relu";
    bias: its address, 0 for none; scaled: alpha is a vector ``[out]`` on the device.
    """

    device: int
    dtype: torch.dtype
    result: torch.dtype
    out: int
    inputs: int
    tokens: int
    columns: bool
    rows: bool
    algorithm: int = 0
    activation: str = ""
    bias: int = 0
    scaled: bool = False


class Plan:
    """Raises `Refused` for a problem that the library does not solve. workspace: bytes that a launch needs on the device.

    Of the thread and the device that ``handle``, an address, was made for.
    """

    def __init__(self, library: Library, handle: int, problem: Problem) -> None:
        self._library, self._handle, self.problem = library, handle, problem
        self._structs = Structs(library.struct, 6)
        self._numbers = c_float(1), c_float(0), c_void_p(0)
        self._one, self._zero, self._streams = map(ctypes.addressof, self._numbers)
        self._stream, self._matmul = self._numbers[2], library.functions.cusparseLtMatmul
        self._made: list[tuple[str, int]] = []
        self.workspace = 0
        try:
            self._make()
        except Refused:
            self.close()
            raise

    def _make(self) -> None:
        of, (a, b, d, product, selection, plan) = self.problem, self._structs.addresses
        kind, result = CUDA_TYPES[of.dtype], CUDA_TYPES[of.result]
        self._init("StructuredDescriptor", "MatDescriptor", a, of.out, of.inputs, of.inputs, ALIGNMENT, kind, ROWS, 0)
        sizes = (of.inputs, of.tokens, of.tokens) if of.columns else (of.tokens, of.inputs, of.inputs)
        self._init("DenseDescriptor", "MatDescriptor", b, *sizes, ALIGNMENT, kind, ROWS)
        laid = (of.out, COLUMNS) if of.rows else (of.tokens, ROWS)
        self._init("DenseDescriptor", "MatDescriptor", d, of.out, of.tokens, laid[0], ALIGNMENT, result, laid[1])
        turned = AS_IS if of.columns else TRANSPOSED
        compute = COMPUTE_32I if of.dtype == torch.int8 else COMPUTE_32F
        self._init("MatmulDescriptor", "", product, AS_IS, turned, a, b, d, d, compute)
        for attribute, value in self._attributes():
            self._set("cusparseLtMatmulDescSetAttribute", product, attribute, value)
        self._init("MatmulAlgSelection", "MatmulAlgSelection", selection, product, 0)
        if of.algorithm:
            algorithm = Algorithm.of(of.algorithm)
            self._set("cusparseLtMatmulAlgSetAttribute", selection, CONFIG, c_int(algorithm.config))
            for attribute, number in ((SPLIT, algorithm.split), (SPLIT_MODE, algorithm.mode)):
                if number:
                    self._set("cusparseLtMatmulAlgSetAttribute", selection, attribute, c_int(number))
        self._init("MatmulPlan", "MatmulPlan", plan, product, selection)
        size = c_size_t(0)
        self._library.call("cusparseLtMatmulGetWorkspace", self._handle, plan, ctypes.addressof(size))
        self.workspace, self._plan, self._selection = size.value, plan, selection

    def _attributes(self) -> list[tuple[int, Any]]:
        of = self.problem
        wanted: list[tuple[bool, int, Any]] = [
            (of.activation == "relu", RELU, c_int(1)),
            (of.scaled, ALPHA_VECTOR, c_int(1)),
            (of.bias != 0, BIAS_POINTER, c_void_p(of.bias)),
        ]
        return [(attribute, value) for asked, attribute, value in wanted if asked]

    def _init(self, what: str, destroyed_as: str, address: int, *given: int) -> None:
        self._library.call(f"cusparseLt{what}Init", self._handle, address, *given)
        if destroyed_as:
            self._made.append((f"cusparseLt{destroyed_as}Destroy", address))

    def _set(self, name: str, struct: int, attribute: int, value: Any) -> None:
        self._library.call(name, self._handle, struct, attribute, ctypes.addressof(value), ctypes.sizeof(value))

    def read(self, attribute: int) -> int:
        """An attribute of the selection, such as `CONFIG` or `CONFIGS`, their number. Raises `Refused`."""
        value = c_int(0)
        name, where = "cusparseLtMatmulAlgGetAttribute", ctypes.addressof(value)
        self._library.call(name, self._handle, self._selection, attribute, where, ctypes.sizeof(value))
        return value.value

    def launch(self, packed: int, x: int, y: int, workspace: int, stream: int, alpha: int = 0) -> None:
        """Put the product on a stream. All are addresses on the device; alpha only for a problem that is ``scaled``.

        Raises NMError if the library fails, with the sizes.
        """
        self._stream.value = stream
        one = alpha or self._one
        status = self._matmul(
            self._handle, self._plan, one, packed, x, self._zero, y, y, workspace, self._streams, 1
        )  # fmt: skip
        if status:
            raise NMError(
                f"{self._library.refused('cusparseLtMatmul', status)} for {self.problem}: "
                "leave this weight dense with exclude=, and report it"
            )

    def close(self) -> None:
        """Give everything back to the library, last first. What it has launched runs on."""
        while self._made:
            self._library.drop(*self._made.pop())
