# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Products of bfloat16 with bfloat16, where the processor has an operation for them: against float64, and against what they replace.

With the operation (AVX512-BF16) data, values and results are bfloat16 in C; without it they become float32 and back in Python.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed_products import ACTIVATIONS, FORMS, Operands, Product, libraries, running_on, sparse

import nm_compiler as nm
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.library import load
from nm_compiler.runtime.native.ops import packed_linear
from nm_compiler.runtime.native.packing import pack
from nm_compiler.runtime.native.shapes import FEWEST, of_conv2d, of_linear

LIBRARY = libraries().get("avx512")
WITHOUT = LIBRARY and replace(LIBRARY, halves=False)
pytestmark = pytest.mark.skipif(LIBRARY is None or not LIBRARY.halves, reason=f"no AVX512-BF16 here: {load()}")
EVEN = [Pattern(n, m) for m in (2, 4, 8, 16, 32) for n in range(1, m) if 32 // m * n % 2 == 0]
"""Patterns whose kept positions come in twos in 32 neighbours."""
BOTH: dict[str, Any] = {"values": torch.bfloat16, "dtype": torch.bfloat16}


@st.composite
def products(draw: Any) -> Product:
    pattern = draw(st.sampled_from([Pattern(n, m) for n in (1, 2) for m in (4, 8, 16)]) | st.sampled_from(EVEN))
    common: Any = {
        "pattern": pattern, "form": draw(st.sampled_from(FORMS)), "bias": draw(st.booleans()), "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from(list(ACTIVATIONS))), **BOTH,
    }  # fmt: skip
    if draw(st.booleans()):
        tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 9, 13, 24, 32, 33, 63, 130, 251]))
        rows = draw(st.integers(1, 70) | st.sampled_from([213]))
        return Product(
            rows=rows, inputs=pattern.m * draw(st.integers(1, 12) | st.sampled_from([24, 41])), lead=(tokens,), **common
        )
    two = lambda least, most: st.tuples(st.integers(least, most), st.integers(least, most))  # noqa: E731
    product = Product(
        rows=draw(st.integers(1, 20)), inputs=pattern.m * draw(st.integers(1, 3)),
        lead=(draw(st.integers(0, 3)), *draw(two(1, 12))), kernel=draw(two(1, 3)), stride=draw(two(1, 3)),
        padding=draw(two(0, 2)), dilation=draw(two(1, 2)), groups=draw(st.integers(1, 3)), **common,
    )  # fmt: skip
    assume(product.possible)
    return product


@given(product=products(), seed=st.integers(0, 1000))
@settings(max_examples=120, deadline=None)
def test_products_of_any_shape_pattern_layout_and_epilogue_are_what_float64_says(product: Product, seed: int) -> None:
    product.operands(seed).check(LIBRARY)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "4:8", "1:16"])
@pytest.mark.parametrize(
    "shape", [(1056, 1040, 300), (1056, 1056, 57), (48, 4096, 30), (48, 4096, 3), (1100, 64, 900)], ids=str
)
def test_weights_beyond_one_block_of_rows_and_of_inputs_are_what_float64_says(
    pattern: str, shape: tuple[int, int, int]
) -> None:
    rows, inputs, tokens = shape
    Product(pattern=Pattern.parse(pattern), rows=rows, inputs=inputs, lead=(tokens,), **BOTH).operands(0).check(LIBRARY)


def test_the_operation_is_used_where_kept_positions_come_in_twos() -> None:
    def of(tokens: int, width: int, pattern: str) -> bool:
        at = Pattern.parse(pattern)
        return of_linear((tokens, width), 16, (at.n, at.m), torch.bfloat16, "", True).halves

    for case in ((1, 64, "2:4"), (100, 36, "2:4"), (1, 32, "1:16"), (FEWEST + 1, 64, "4:8"), (9, 64, "2:32")):
        assert of(*case), case
    odd = ((100, 36, "1:4"), (100, 96, "1:32"), (100, 64, "1:32"), (100, 60, "2:5"))
    for case in (*odd, (FEWEST, 64, "4:8")):  # the last is where the float32 kernel is faster
        assert not of(*case), case
    how: Any = (8, (2, 4), torch.bfloat16, (3, 3), (1, 1), (1, 1), (1, 1), 1, "", True)
    assert of_conv2d((2, 32, 5, 5), True, *how).halves
    assert not of_conv2d((2, 32, 5, 5), False, *how).halves


@pytest.mark.parametrize("lead", [(1,), (7,), (20,), (100,)], ids=str)
def test_the_result_is_the_float32_kernels_but_for_its_last_rounding(lead: tuple[int, ...]) -> None:
    operands = Product(
        pattern=Pattern(2, 4), rows=70, inputs=256, lead=lead, residual=True, activation="gelu", **BOTH
    ).operands(0)
    with_it, without = operands.result(LIBRARY), operands.result(WITHOUT)
    exact, size = operands.exact()
    near = (exact - exact.bfloat16().double()).abs() + 4e-6 * size  # half a step of bfloat16, and sums of float32
    assert bool(((with_it.double() - exact).abs() <= near).all())
    assert bool(((without.double() - exact).abs() <= near).all())


@pytest.mark.parametrize(("x", "residual"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_what_is_float32_is_not_rounded_for_it(x: torch.dtype, residual: torch.dtype) -> None:
    operands = Product(pattern=Pattern(2, 4), rows=20, inputs=64, lead=(40,), residual=True, values=torch.bfloat16).operands(0)
    given_ = replace(operands, x=operands.x.to(x), residual=operands.residual.to(residual))
    assert torch.equal(given_.result(LIBRARY), given_.result(WITHOUT))


@pytest.mark.parametrize("lead", [(1,), (5,), (30,), (200,), (2, 9, 11)], ids=str)
def test_one_two_and_three_threads_give_the_same_bits(lead: tuple[int, ...], threads: Any) -> None:
    image: Any = {"kernel": (3, 3), "form": "channels_last", "stride": (2, 1), "groups": 2} if len(lead) == 3 else {}
    operands = Product(pattern=Pattern(2, 4), rows=300, inputs=160, lead=lead, activation="silu", **image, **BOTH).operands(0)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found += [operands.result(LIBRARY) for _ in range(2)]
    assert all(torch.equal(found[0], each) for each in found)


@pytest.mark.parametrize("tokens", [1, 3, 20, 50])
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "2:8"])
def test_nan_and_inf_reach_the_outputs_whose_weights_are_kept_and_no_others(tokens: int, pattern: str) -> None:
    at = Pattern.parse(pattern)
    weight = torch.zeros(37, 96)
    for start in range(0, 96, at.m):  # n kept in every group, none of them zero
        kept = torch.rand(37, at.m).argsort(1)[:, : at.n] + start
        weight.scatter_(1, kept, torch.rand(37, at.n) + 0.5)
    packed = pack(weight.bfloat16(), at, dtype=torch.bfloat16)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in (0, at.m - 1, 40, 95):
            x = torch.randn(tokens, 96).bfloat16()
            x[tokens // 2, place] = bad
            with running_on(LIBRARY):
                y = packed_linear(x, packed.values, packed.codes, None, None, None, [at.n, at.m], 37, "")
            wrong = ~y.isfinite()
            assert not wrong[torch.arange(tokens) != tokens // 2].any()
            assert torch.equal(wrong[tokens // 2], weight[:, place] != 0)


@pytest.mark.parametrize("lead", [(1,), (4,), (50,)], ids=str)
def test_a_code_beyond_its_group_is_an_error_and_not_a_read(lead: tuple[int, ...]) -> None:
    for pattern in (Pattern(1, 2), Pattern(2, 8), Pattern(1, 8), Pattern(2, 32)):
        operands = Product(pattern=pattern, rows=20, inputs=pattern.m * 4, lead=lead, **BOTH).operands(0)
        operands.packed.codes.view(-1)[-16] = -1
        with pytest.raises(nm.NMError, match="names a position beyond its group: its buffers were changed"):
            operands.result(LIBRARY)


@pytest.mark.parametrize("pattern", ["2:4", "2:16", "1:4"])
def test_any_code_of_a_pattern_without_room_for_a_wrong_one_stays_inside_its_group(pattern: str) -> None:
    at = Pattern.parse(pattern)
    for lead in ((1,), (3,), (60,)):
        operands = Product(pattern=at, rows=20, inputs=at.m * 2, lead=lead, **BOTH).operands(0)
        operands.packed.codes.random_(-(2**31), 2**31 - 1)
        assert bool(operands.result(LIBRARY).isfinite().all())


def test_a_token_gets_the_bits_of_each_tile_by_itself(threads: Any) -> None:
    """1,205 rows are tasks of ten tiles, of which two may go at once; 1,100 are tasks of nine, where one stays alone."""
    threads(1)
    for rows in (1205, 1100):
        whole = Product(pattern=Pattern(2, 4), rows=rows, inputs=1072, lead=(1,), bias=False, **BOTH).operands(0)
        values, codes = whole.packed.values, whole.packed.codes
        alone = []
        for at in range(values.shape[1]):
            part = replace(whole.packed, values=values[:, at : at + 1], codes=codes[:, at : at + 1], shape=(16, 1072))
            alone.append(Operands.result(replace(whole, packed=part), LIBRARY))
        assert torch.equal(whole.result(LIBRARY), torch.cat(alone, -1)[:, :rows])


def test_a_lowered_bfloat16_model_is_the_frozen_one_in_bfloat16() -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 1), torch.nn.Flatten(2))
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 16)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = sparse(tuple(weight.shape), Pattern(2, 4))
    x = torch.randn(3, 16, 8, 8).to(memory_format=torch.channels_last)
    lowered = nm.lower(model, (x,), backend="cpu", dtype=torch.bfloat16, force=["*"])
    wanted, found = model(x).double(), lowered(x)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - wanted.detach()).norm() / wanted.detach().norm()) < 1e-2
