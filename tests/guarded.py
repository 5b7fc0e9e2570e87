# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Products whose operands end, or begin, at pages that must not be touched: a process of its own, which a wrong read kills.

    python tests/guarded.py

Then a child is forked while torch has threads, and has to compute the same.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from dataclasses import replace
from functools import partial

import torch
from packed_products import Operands, Product, any_product, libraries
from sweep_cases import any_case, check_any
from torch import Tensor

from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.library import Library

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Memory between two pages that are forbidden."""

    def __init__(self, most: int) -> None:
        pages = -(-most // mmap.PAGESIZE)
        self.memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        self.size = pages * mmap.PAGESIZE
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + mmap.PAGESIZE
        for page in (self.start - mmap.PAGESIZE, self.start + self.size):
            assert LIBC.mprotect(page, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()

    def holding(self, tensor: Tensor, at_end: bool) -> Tensor:
        """A copy that touches one of the two pages, lying as ``tensor`` does; what was here before is overwritten."""
        assert tensor.nbytes <= self.size
        offset = mmap.PAGESIZE + (self.size - tensor.nbytes if at_end else 0)
        if not tensor.numel():
            return tensor
        flat = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def sweep(library: Library, places: dict[str, Guarded], products: int) -> None:
    pick = random.Random(0)
    for number in range(products):
        product = replace(any_product(pick), form=pick.choice(["plain", "channels_last"]))
        plain = product.operands(number)
        wanted = plain.result(library)
        for at_end in (True, False):
            parts = {name: getattr(plain.packed, name) for name in ("values", "codes", "scales")}
            parts = {name: part if part is None else places[name].holding(part, at_end) for name, part in parts.items()}
            others = {name: getattr(plain, name) for name in ("x", "bias", "residual")}
            others = {name: part if part is None else places[name].holding(part, at_end) for name, part in others.items()}
            there = Operands(product, replace(plain.packed, **parts), **others)
            assert torch.equal(there.result(library), wanted), product


def sweep_weights(library: Library, places: dict[str, Guarded], cases: int) -> None:
    """Masks and what training does with them, of weights that lie at a page: each is read, and written, in one pass."""
    pick = random.Random(0)
    for number in range(cases):
        check_any(any_case(pick), library, partial(lying_at, places, number % 2 == 0))


def lying_at(places: dict[str, Guarded], at_end: bool, name: str, operand: Tensor) -> Tensor:
    return places[name].holding(operand, at_end)


def fork(library: Library) -> int:
    """The child's exit status: 0 if it computed the same."""
    operands = Product(pattern=Pattern(2, 4), rows=100, inputs=64, lead=(300,)).operands(0)
    torch.set_num_threads(2)
    wanted = operands.result(library)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(operands.result(library), wanted) else 7)
    _, status = os.waitpid(child, 0)
    assert torch.equal(operands.result(library), wanted)
    return os.waitstatus_to_exitcode(status)


def main(products: int = 80) -> None:
    torch.set_num_threads(1)
    places = {name: Guarded(4 << 20) for name in ("x", "values", "codes", "scales", "bias", "residual")}
    for isa, library in libraries().items():
        sweep(library, places, products)
        names = ("weight", "grad", "mask", "out", "second", "live", "table")
        sweep_weights(library, {name: Guarded(4 << 20) for name in names}, products)
        sys.stdout.write(f"{isa}\n")
    status = fork(library)
    sys.stdout.write("fork\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
