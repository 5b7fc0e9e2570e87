# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""cuSPARSELt's C functions on a CPU: they read and write real addresses, and compute from what the descriptors say alone.

A struct holds a number, which stands for what was put in; one that was destroyed, or never made, is not recognised. Weights
are packed as in cusparselt_standin.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from typing import Any

import torch
from cusparselt_standin import unpacked
from torch import Tensor

from nm_compiler.runtime.cusparselt.direct import Direct
from nm_compiler.runtime.cusparselt.library import Library

DTYPES = {2: torch.float16, 14: torch.bfloat16, 3: torch.int8}
INVALID_VALUE, NOT_SUPPORTED = 3, 10
CONFIGS = 6
WRONG, REFUSED, FAILING = 4, 5, 3  # configurations: one computes something else, one has no plan, one fails when launched


class FakeFunctions:
    """calls: how often each function was called; live: structs by number; launches: of products, as they were."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.live: dict[int, dict[str, Any]] = {}
        self.launches: list[dict[str, Any]] = []
        self.refuses: set[str] = set()
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cusparseLt") or name not in KNOWN:
            raise AttributeError(name)

        def function(*given: Any) -> int:
            assert all(isinstance(each, int) for each in given)
            self.calls[name] += 1
            if name in self.refuses:
                return NOT_SUPPORTED
            return KNOWN[name](self, *given) or 0

        return function

    def put(self, address: int, **facts: Any) -> None:
        assert address % 64 == 0
        self._next += 1
        ctypes.c_uint64.from_address(address).value = self._next
        self.live[self._next] = facts

    def at(self, address: int) -> dict[str, Any]:
        return self.live[ctypes.c_uint64.from_address(address).value]

    def gone(self, address: int) -> None:
        del self.live[ctypes.c_uint64.from_address(address).value]

    def handle(self, address: int) -> None:
        assert self.at(address)["thread"] == threading.get_ident(), "a handle of another thread"


def _init(self: FakeFunctions, handle: int) -> None:
    self.put(handle, thread=threading.get_ident())


def _structured(
    self: FakeFunctions,
    handle: int,
    at: int,
    rows: int,
    columns: int,
    ld: int,
    alignment: int,
    kind: int,
    order: int,
    share: int,
) -> int | None:
    self.handle(handle)
    if rows % 16 or columns % 16 or ld != columns or order != 2 or share or alignment != 16:
        return INVALID_VALUE
    self.put(at, rows=rows, columns=columns, dtype=DTYPES[kind])
    return None


def _dense(
    self: FakeFunctions, handle: int, at: int, rows: int, columns: int, ld: int, alignment: int, kind: int, order: int
) -> int | None:
    self.handle(handle)
    if rows % 8 or columns % 8 or ld != (columns if order == 2 else rows) or order not in (1, 2) or alignment != 16:
        return INVALID_VALUE
    self.put(at, rows=rows, columns=columns, dtype=DTYPES[kind], order=order)
    return None


def _product(
    self: FakeFunctions, handle: int, at: int, op_a: int, op_b: int, a: int, b: int, c: int, d: int, compute: int
) -> None:
    self.handle(handle)
    assert op_a == 0
    assert c == d
    facts = {"a": self.at(a), "b": self.at(b), "d": self.at(d), "turned": op_b}
    assert compute == (0 if facts["a"]["dtype"] == torch.int8 else 2)
    self.put(at, **facts, attributes={})


def _set_product(self: FakeFunctions, handle: int, at: int, attribute: int, value: int, size: int) -> None:
    self.handle(handle)
    kind = ctypes.c_uint64 if attribute == 8 else ctypes.c_int
    assert size == ctypes.sizeof(kind)
    self.at(at)["attributes"][attribute] = kind.from_address(value).value


def _selection(self: FakeFunctions, handle: int, at: int, product: int, algorithm: int) -> None:
    self.handle(handle)
    assert algorithm == 0
    self.put(at, of=self.at(product), numbers={})


def _set_selection(self: FakeFunctions, handle: int, at: int, attribute: int, value: int, size: int) -> int | None:
    self.handle(handle)
    assert size == 4
    number = ctypes.c_int.from_address(value).value
    if attribute == 0 and not 0 <= number < CONFIGS:
        return INVALID_VALUE
    self.at(at)["numbers"][attribute] = number
    return None


def _get_selection(self: FakeFunctions, handle: int, at: int, attribute: int, value: int, size: int) -> None:
    self.handle(handle)
    assert size == 4
    ctypes.c_int.from_address(value).value = CONFIGS if attribute == 1 else self.at(at)["numbers"].get(attribute, 0)


def _plan(self: FakeFunctions, handle: int, at: int, product: int, selection: int) -> int | None:
    self.handle(handle)
    if self.at(selection)["numbers"].get(0) == REFUSED:
        return NOT_SUPPORTED
    self.put(at, **self.at(product), numbers=dict(self.at(selection)["numbers"]))
    return None


def _workspace(self: FakeFunctions, handle: int, plan: int, size: int) -> None:
    self.handle(handle)
    ctypes.c_size_t.from_address(size).value = 32 if self.at(plan)["numbers"] else 0


def _matmul(
    self: FakeFunctions, handle: int, plan: int, alpha: int, a: int, b: int, beta: int, c: int, d: int, workspace: int, streams: int,
    count: int,
) -> int | None:  # fmt: skip
    self.handle(handle)
    of = self.at(plan)
    attributes, numbers = of["attributes"], of["numbers"]
    assert ctypes.c_float.from_address(beta).value == 0
    assert c == d
    assert count == 1
    assert (workspace != 0) is bool(numbers)
    assert a % 16 == b % 16 == d % 16 == 0
    if numbers.get(0) == FAILING:
        return NOT_SUPPORTED
    stream = ctypes.c_uint64.from_address(streams).value
    self.launches.append({"stream": stream, "numbers": numbers, "attributes": attributes, "tokens": of["d"]["columns"]})
    matrix = _weight(a, of["a"])
    dense = _tensor(b, (of["b"]["rows"], of["b"]["columns"]), of["b"]["dtype"])
    y = matrix.double() @ (dense.t() if of["turned"] else dense).double()
    if attributes.get(5):
        y *= _tensor(alpha, (len(y), 1), torch.float32).double()
    else:
        assert ctypes.c_float.from_address(alpha).value == 1
    if 8 in attributes:
        y += _tensor(attributes[8], (len(y), 1), of["d"]["dtype"]).double()
    y = y.relu() if attributes.get(0) else y
    y = y + 1 if numbers.get(0) == WRONG else y
    y = y if of["d"]["order"] == 2 else y.t()
    _tensor(d, tuple(y.shape), of["d"]["dtype"]).copy_(y)
    return None


def _weight(address: int, of: dict[str, Any]) -> Tensor:
    out, inputs, dtype = of["rows"], of["columns"], of["dtype"]
    count = out * inputs // 2 + -(-out // 64) * -(-inputs // 64) * 512 // dtype.itemsize
    flat = _tensor(address, (count,), dtype)
    return unpacked(torch.nn.functional.pad(flat, (0, -count % out)).view(out, -1), inputs)


def _tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).view(shape)


KNOWN = {
    "cusparseLtInit": _init, "cusparseLtDestroy": FakeFunctions.gone, "cusparseLtStructuredDescriptorInit": _structured,
    "cusparseLtDenseDescriptorInit": _dense, "cusparseLtMatDescriptorDestroy": FakeFunctions.gone,
    "cusparseLtMatmulDescriptorInit": _product, "cusparseLtMatmulDescSetAttribute": _set_product,
    "cusparseLtMatmulAlgSelectionInit": _selection, "cusparseLtMatmulAlgSetAttribute": _set_selection,
    "cusparseLtMatmulAlgGetAttribute": _get_selection, "cusparseLtMatmulAlgSelectionDestroy": FakeFunctions.gone,
    "cusparseLtMatmulPlanInit": _plan, "cusparseLtMatmulPlanDestroy": FakeFunctions.gone,
    "cusparseLtMatmulGetWorkspace": _workspace, "cusparseLtMatmul": _matmul,
}  # fmt: skip
STREAM = 0xBEEF_0000_1234


def direct(functions: FakeFunctions, most: int = 512) -> Direct:
    """A binding to it."""
    return Direct(Library(functions, 800), most=most, stream=lambda _: STREAM)
