# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Random weights for the kernels that mask and train them, and torch's answers: for tests/test_sweeps.py and its children."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from nm_compiler.layout import as_rows
from nm_compiler.pattern import Pattern, combination_table
from nm_compiler.runtime.native.library import Library
from nm_compiler.solvers import sweeps
from nm_compiler.solvers.combinations import byte_table, pack, retire, undecided, union
from nm_compiler.solvers.magnitude import magnitude_mask

LAYOUTS = ("linear", "transposed", "conv", "channels_last", "experts", "experts_turned")
HALF = (torch.float16, torch.bfloat16)
REAL = (torch.float32, torch.float64)
Place = Callable[[str, Tensor], Tensor]
"""Where an operand lies, by its name: weight, grad, mask, live, table, out or second."""


@contextmanager
def swept_by(library: Library | None) -> Iterator[None]:
    """With these kernels, or with none."""
    with patch.object(sweeps, "kernels", lambda: library):
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight and all that lies beside it. size: groups along its input axis and rows, small or large."""

    pattern: Pattern
    layout: str
    dtype: torch.dtype
    values: str
    size: tuple[int, int]
    seed: int

    @property
    def rows(self) -> list[int]:
        return {"linear": [0, 1], "transposed": [1, 0], "experts": [0, 1, 2], "experts_turned": [0, 2, 1]}.get(
            self.layout, [0, 2, 3, 1]
        )

    @property
    def in_axis(self) -> int:
        return self.rows[-1]

    def shape(self) -> tuple[int, ...]:
        inputs, out = self.pattern.m * self.size[0], self.size[1]
        return {
            "linear": (out, inputs), "transposed": (inputs, out), "experts": (3, out, inputs), "experts_turned": (3, inputs, out),
        }.get(self.layout, (out, inputs, 3, 2))  # fmt: skip

    def weight(self, more: int = 0) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed + more)
        if self.values == "whole":  # small: sums are exact in any order, ties are common
            made = torch.randint(-3, 4, self.shape(), generator=draw).to(self.dtype)
        else:
            made = torch.randn(self.shape(), generator=draw).to(self.dtype)
        if self.values == "odd":
            tiny = torch.finfo(self.dtype).smallest_normal
            strange = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny / 2, -tiny / 4, 1.0], dtype=self.dtype)
            chosen = strange[torch.randint(0, len(strange), self.shape(), generator=draw)]
            made = torch.where(torch.rand(self.shape(), generator=draw) < 0.7, chosen, made)
        return made.to(memory_format=torch.channels_last) if self.layout == "channels_last" else made

    def live(self) -> Tensor:
        """Packed live sets; some groups have one combination, some all."""
        leading = 2 if self.layout.startswith("experts") else 1
        viewed = as_rows(self.weight(), self.rows)
        groups = viewed[(0,) * leading].numel() // self.pattern.m
        draw = torch.Generator().manual_seed(self.seed + 7)
        share = torch.rand(*viewed.shape[:leading], groups, 1, generator=draw) * 1.3
        bits = torch.rand(*viewed.shape[:leading], groups, self.pattern.combinations, generator=draw) < share
        bits[..., self.seed % self.pattern.combinations] |= ~bits.any(-1)
        return pack(bits)


def any_case(pick: random.Random) -> Case:
    m = pick.choice([2, 3, 4, 4, 8, 8, 16, 5, 12, 31, 32])
    n = pick.choice([1, 2, m // 2, m - 1, pick.randrange(1, m)])
    return Case(
        pattern=Pattern(min(max(n, 1), m - 1), m), layout=pick.choice(LAYOUTS), dtype=pick.choice(REAL + HALF),
        values=pick.choice(["random", "whole", "odd"]), size=(pick.choice([1, 2, 3, 9]), pick.choice([1, 5, 33, 70])), seed=pick.randrange(999),
    )  # fmt: skip


def check_any(case: Case, library: Library, place: Place = lambda _, t: t) -> None:
    """All that a case can be asked."""
    check_masks(case, library, place)
    check_sums(case.seed, library, place)
    if case.dtype in REAL:
        check_decay(case, library, place)
        if case.pattern.combinations <= 500:
            check_live(case, library, place)


def bits(tensor: Tensor) -> Tensor:
    """So that NaN equals NaN and -0 is not 0."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(whole[tensor.element_size()])


def check_masks(case: Case, library: Library, place: Place = lambda _, t: t) -> None:
    """The mask, the masked weight, and the masked weight by ordered rows."""
    weight, pattern = place("weight", case.weight()), case.pattern
    expected = magnitude_mask(weight, pattern.n, pattern.m, case.in_axis)
    mask, kept = place("mask", torch.empty_like(expected)), place("out", torch.empty_like(weight))
    with swept_by(library):
        done = sweeps.largest(weight, pattern, case.in_axis, mask) and sweeps.largest(weight, pattern, case.in_axis, kept)
        ours = place("grad", torch.empty_like(weight))
        assert sweeps.keep(weight, expected, ours)
    none = bits(weight.new_zeros(()))
    wanted = torch.where(expected, bits(weight), none)
    assert torch.equal(bits(ours), wanted)
    assert done or pattern.m in (3, 5, 6, 7)
    if done:
        assert torch.equal(mask, expected)
        assert torch.equal(bits(kept), wanted)
    if len(weight) % pattern.m == 0 and case.layout == "linear":
        order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(case.seed))
        by_row = torch.empty_like(weight)
        with swept_by(library):
            done = sweeps.largest_rows(weight, order, pattern, by_row)
        if done:
            ordered = torch.empty_like(expected).index_copy_(0, order, magnitude_mask(weight[order], pattern.n, pattern.m, 0))
            assert torch.equal(bits(by_row), torch.where(ordered, bits(weight), none))


def check_live(case: Case, library: Library, place: Place = lambda _, t: t) -> None:
    """Everything that training with live sets does."""
    weight, grad, pattern = place("weight", case.weight()), place("grad", case.weight(1)), case.pattern
    live, table, at = place("live", case.live()), place("table", byte_table(pattern)), case.rows
    expected = torch.empty(weight.shape, dtype=torch.bool)
    rows = as_rows(expected, at)
    rows.copy_(union(live, table).view(rows.shape))
    mask = place("mask", torch.zeros_like(expected))
    with swept_by(library):
        if sweeps.cover(live, table, as_rows(mask, at)):
            assert torch.equal(mask, expected)
    none = bits(weight.new_zeros(()))
    kept = place("out", torch.empty_like(weight))
    with swept_by(library):
        assert sweeps.covered(as_rows(weight, at), live, table, as_rows(kept, at))
    assert torch.equal(bits(kept), torch.where(expected, bits(weight), none))
    results = place("out", torch.empty_like(weight)), place("second", torch.empty_like(weight))
    with swept_by(library):
        g, w, dw, ds = (as_rows(t, at) for t in (grad, weight, *results))
        assert sweeps.gradients(g, w, live, table, (dw, ds))
    through = torch.where(expected, grad, grad.new_zeros(()))
    assert torch.equal(bits(results[0]), bits(through))
    moved, choice = weight * through, undecided(live, packed=True, last=1)
    groups = as_rows(moved, at).unflatten(-1, (-1, pattern.m))
    wanted = (groups * choice.view(groups.shape[:-1]).unsqueeze(-1)).flatten(-2)
    torch.testing.assert_close(as_rows(results[1], at), wanted, rtol=0, atol=0, equal_nan=True)

    combinations = pattern.combinations
    table = combination_table(pattern)
    for left in {1, 2, combinations // 2, combinations - 1} - {0}:
        with swept_by(library):
            kept = sweeps.retire(as_rows(weight, at), live, pattern, left)
        assert kept is not None
        if case.values == "whole":  # else sums round otherwise
            assert torch.equal(kept, retire(as_rows(weight, at).double(), live, table, keep=left, by_position=True))
        assert not bool((kept & ~live).any())


def check_decay(case: Case, library: Library, place: Place = lambda _, t: t) -> None:
    weight, grad = place("weight", case.weight()), place("grad", case.weight(1))
    masked = torch.where(magnitude_mask(weight, case.pattern.n, case.pattern.m, case.in_axis), weight, weight.new_zeros(()))
    masked = torch.empty_like(weight).copy_(masked)
    with swept_by(library):
        found = sweeps.decay(grad, weight, masked, 2.3e-4)
    assert found is not None
    torch.testing.assert_close(found, (weight - masked).mul_(2.3e-4).add_(grad), rtol=0, atol=0, equal_nan=True)


def check_sums(seed: int, library: Library, place: Place = lambda _, t: t) -> None:
    """The (max, +) product of bytes, of any size, with columns that come twice or not at all."""
    draw = torch.Generator().manual_seed(seed)
    slots, there, wanted, rows = (int(torch.randint(1, most, (), generator=draw)) for most in (22, 22, 22, 40))
    left, right = (torch.randint(256, (size, 64 * rows), generator=draw, dtype=torch.uint8) for size in (slots, there))
    order = torch.randint(there, (wanted,), generator=draw)
    operands = place("weight", left), place("grad", right), order, place("out", torch.empty(slots, wanted, dtype=torch.int64))
    with swept_by(library):
        done = sweeps.max_sums(*(operand.numpy() for operand in operands))
    assert done == (library.isa != "portable")
    if done:
        assert torch.equal(operands[-1], torch.maximum(left.unsqueeze(1), right[order]).sum(-1, dtype=torch.int64))
