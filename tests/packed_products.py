# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Random products with packed weights, and the same in float64: for tests/test_native.py, tests/sanitize.py and their children."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native import ops
from nm_compiler.runtime.native.library import INSTRUCTION_SETS, Library, load
from nm_compiler.runtime.native.packing import LANES, Packed, code_bits, pack, sizes

VALUES = (torch.float32, torch.bfloat16, torch.int8)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
}
FORMS = ("plain", "offset", "sliced", "turned", "channels_last")


def libraries() -> dict[str, Library]:
    """Of every instruction set that this processor has."""
    found = {isa: load(isa) for isa in INSTRUCTION_SETS}
    return {isa: library for isa, library in found.items() if isinstance(library, Library)}


@contextmanager
def running_on(library: Library) -> Iterator[None]:
    """The ops run on these kernels, whatever the processor's best are."""
    with patch.object(ops, "_library", lambda: library):
        yield


def sparse(shape: tuple[int, ...], pattern: Pattern) -> Tensor:
    """A weight that is N:M along axis 1; some groups have fewer non-zeros, some none."""
    groups = torch.randn(shape).movedim(1, -1).unflatten(-1, (-1, pattern.m))
    kept = torch.rand(groups.shape).argsort(-1).argsort(-1) < pattern.n
    kept &= torch.rand(groups.shape) < 0.9
    return (groups * kept).flatten(-2).movedim(-1, 1).contiguous()


def unpack(packed: Packed) -> Tensor:
    """The dense weight again, float32. What was packed as float32 comes back as it was, to the bit."""
    pattern, (tiles, steps, _) = packed.pattern, sizes(packed.shape, packed.pattern, packed.conv_groups)
    bits = code_bits(pattern.m)
    shifts = torch.arange(0, 32, bits).view(-1, 1)
    codes = ((packed.codes.unsqueeze(3) >> shifts) & ((1 << bits) - 1)).flatten(2, 3)[:, :, :steps]
    values = packed.values.float()
    if packed.scales is not None:
        values = values * packed.scales.unsqueeze(2)
    rows = packed.shape[0] // packed.conv_groups
    places, kept = (
        each.transpose(2, 3).reshape(packed.conv_groups, tiles * LANES, -1, pattern.n)[:, :rows] for each in (codes, values)
    )
    grouped = torch.zeros(*places.shape[:-1], pattern.m).scatter_(-1, places.long(), kept)
    flat = grouped.reshape(packed.shape[0], -1, packed.shape[1])
    return flat.movedim(-1, 1).reshape(packed.shape).contiguous()


def laid_out(x: Tensor, form: str) -> Tensor:
    """The same numbers, lying otherwise: not at the start of its storage, with gaps, with axes exchanged."""
    if form == "offset":
        storage = x.new_empty(x.numel() + 1)
        return storage[1:].view(x.shape).copy_(x)
    if form == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if form == "turned" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if form == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product: sizes and what comes with it. kernel: empty for a linear; rows, inputs: of one conv group."""

    pattern: Pattern
    rows: int
    inputs: int
    lead: tuple[int, ...]
    """Sizes of x before its features; of a convolution batch, height, width."""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    values: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    """Of x."""
    form: str = "plain"
    bias: bool = True
    residual: bool = False
    activation: str = ""

    @property
    def possible(self) -> bool:
        """Whether an image is no smaller than its kernel."""
        if not self.kernel:
            return True
        axes = zip(self.lead[1:], self.padding, self.dilation, self.kernel, strict=True)
        return all(size + 2 * padding > dilation * (kernel - 1) for size, padding, dilation, kernel in axes)

    def operands(self, seed: int) -> Operands:
        """Random, the same for the same seed."""
        torch.manual_seed(seed)
        shape = (self.groups * self.rows, self.inputs, *self.kernel)
        packed = pack(sparse(shape, self.pattern), self.pattern, conv_groups=self.groups, dtype=self.values)
        channels = self.groups * self.inputs
        sizes = (self.lead[0], channels, *self.lead[1:]) if self.kernel else (*self.lead, channels)
        x = laid_out(torch.randn(sizes).to(self.dtype), self.form)
        bias = torch.randn(shape[0]) if self.bias else None
        plain = Operands(self, packed, x, bias, None)
        if not self.residual:
            return plain
        return replace(plain, residual=laid_out(torch.randn(plain.exact()[0].shape).to(self.dtype), self.form))


@dataclass(frozen=True)
class Operands:
    """What a product reads."""

    product: Product
    packed: Packed
    x: Tensor
    bias: Tensor | None
    residual: Tensor | None

    def result(self, library: Library) -> Tensor:
        """By the op."""
        each, packed = self.product, self.packed
        pattern = [each.pattern.n, each.pattern.m]
        given = (self.x, packed.values, packed.codes, packed.scales, self.bias, self.residual, pattern, packed.shape[0])
        with running_on(library):
            if not each.kernel:
                return torch.ops.nm.packed_linear(*given, each.activation)
            how = (list(each.kernel), list(each.stride), list(each.padding), list(each.dilation), each.groups)
            return torch.ops.nm.packed_conv2d(*given, *how, each.activation)

    def exact(self) -> tuple[Tensor, Tensor]:
        """In float64, and how far float32 may be from it: by the size of what is summed."""
        weight, x = unpack(self.packed).double(), self.x.double()
        bias, added = self.bias, self.residual
        plain = self._dense(x, weight, None if bias is None else bias.double())
        size = self._dense(x.abs(), weight.abs(), None if bias is None else bias.double().abs())
        plain, size = (plain, size) if added is None else (plain + added.double(), size + added.double().abs())
        return ACTIVATIONS[self.product.activation](plain), size

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        each = self.product
        if not each.kernel:
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, each.stride, each.padding, each.dilation, each.groups)

    def check(self, library: Library) -> None:
        """Raises AssertionError where the op is farther from float64 than its sums can be."""
        y = self.result(library)
        exact, size = self.exact()
        assert y.shape == exact.shape
        assert y.dtype == self.x.dtype
        bound = 2e-6 * size + 1e-6
        if y.dtype != torch.float32:
            bound += exact.abs() * torch.finfo(y.dtype).eps
        off = (y.double() - exact).abs() - bound
        assert not y.numel() or float(off.max()) <= 0, f"{self.product}: {float(off.max())} too far"


def any_product(pick: random.Random) -> Product:
    """For sweeps without hypothesis."""
    m, values = pick.choice([4, 8, pick.randint(2, 32)]), pick.choice(VALUES)
    dtype = pick.choice([torch.float32, values]) if values.is_floating_point else torch.float32
    common: Any = {
        "pattern": Pattern(pick.randint(1, m - 1), m), "inputs": m * pick.choice([1, 2, 3, 40]), "values": values, "dtype": dtype,
        "form": pick.choice(FORMS), "bias": pick.random() < 0.5, "residual": pick.random() < 0.5,
        "activation": pick.choice(list(ACTIVATIONS)),
    }  # fmt: skip
    if pick.random() < 0.5:
        return Product(
            **common, rows=pick.choice([pick.randint(1, 70), 213]), lead=(pick.choice([1, 2, 3, 5, 24, 25, 63, 130, 200]),)
        )
    two = lambda least, most: (pick.randint(least, most), pick.randint(least, most))  # noqa: E731
    found = Product(
        **common, rows=pick.randint(1, 36), lead=(pick.randint(0, 3), *two(1, 12)), kernel=two(1, 3), stride=two(1, 3),
        padding=two(0, 2), dilation=two(1, 2), groups=pick.randint(1, 3),
    )  # fmt: skip
    return found if found.possible else any_product(pick)
