# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The CPU kernels against float64, on every instruction set that the processor has; what they must not read, and refuse."""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed_products import ACTIVATIONS, FORMS, VALUES, Operands, Product, libraries, running_on, sparse, unpack
from torch import Tensor
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.library import Library, _parallel, load
from nm_compiler.runtime.native.ops import packed_conv2d, packed_linear
from nm_compiler.runtime.native.packing import MOST_M, code_bits, pack
from nm_compiler.runtime.native.shapes import FEW

LIBRARIES = libraries()
pytestmark = pytest.mark.skipif(not LIBRARIES, reason=f"no CPU kernels here: {load()}")
each_isa = pytest.mark.parametrize("isa", list(LIBRARIES))
BEST = next(reversed(LIBRARIES.values())) if LIBRARIES else None


@st.composite
def patterns(draw: Any) -> Pattern:
    m = draw(st.integers(2, MOST_M) | st.sampled_from([4, 16]))
    return Pattern(draw(st.integers(1, m - 1) | st.integers(1, min(2, m - 1))), m)


@st.composite
def linears(draw: Any) -> Product:
    pattern = draw(patterns())
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 7, 13, FEW, FEW + 1, 63, 112, 130, 251]))
    lead = draw(st.sampled_from([(tokens,), (1, tokens), (tokens, 1), ()]))
    inputs = pattern.m * draw(st.integers(1, 9 if pattern.m < 9 else 4) | st.sampled_from([24, 41]))
    rows = draw(st.integers(1, 70) | st.sampled_from([192, 213]))  # from 192 on panel and lanes run as one, if tokens are many
    return draw(epilogues(Product(pattern=pattern, rows=rows, inputs=inputs, lead=lead)))


@st.composite
def convolutions(draw: Any) -> Product:
    pattern = draw(patterns())
    two = lambda least, most: st.tuples(st.integers(least, most), st.integers(least, most))  # noqa: E731
    product = Product(
        pattern=pattern, rows=draw(st.integers(1, 20)), inputs=pattern.m * draw(st.integers(1, 2)),
        lead=(draw(st.integers(0, 3)), *draw(two(1, 12))), kernel=draw(two(1, 3)), stride=draw(two(1, 3)),
        padding=draw(two(0, 2)), dilation=draw(two(1, 2)), groups=draw(st.integers(1, 3)),
    )  # fmt: skip
    assume(product.possible)
    return draw(epilogues(product))


@st.composite
def epilogues(draw: Any, product: Product) -> Product:
    return replace(
        product, values=draw(st.sampled_from(VALUES)), form=draw(st.sampled_from(FORMS)), bias=draw(st.booleans()),
        residual=draw(st.booleans()), activation=draw(st.sampled_from(list(ACTIVATIONS))),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
    )  # fmt: skip


# -- numbers ----------------------------------------------------------------------------------------------------------------


@each_isa
@given(product=linears(), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_linears_of_any_shape_pattern_layout_and_epilogue_are_what_float64_says(isa: str, product: Product, seed: int) -> None:
    product.operands(seed).check(LIBRARIES[isa])


@each_isa
@given(product=convolutions(), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_convolutions_of_any_geometry_are_what_float64_says_in_the_memory_format_of_x(
    isa: str, product: Product, seed: int
) -> None:
    operands = product.operands(seed)
    operands.check(LIBRARIES[isa])
    x, y = operands.x, operands.result(LIBRARIES[isa])
    if min(*x.shape, *y.shape) > 1 and product.form in ("plain", "channels_last"):
        last = product.form == "channels_last"
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@each_isa
@pytest.mark.parametrize(
    "shape", [(1056, 1040, 300), (1056, 1040, 57), (1100, 64, 900), (16, 2048, 57), (1300, 192, 208)], ids=str
)
def test_weights_beyond_one_block_of_rows_and_of_inputs_are_what_float64_says(isa: str, shape: tuple[int, int, int]) -> None:
    rows, inputs, tokens = shape
    for values in VALUES:
        Product(pattern=Pattern(2, 4), rows=rows, inputs=inputs, lead=(tokens,), values=values).operands(0).check(
            LIBRARIES[isa]
        )


@each_isa
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "1:16", "5:16"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)], ids=str)
def test_outputs_in_lanes_and_tokens_in_lanes_give_the_same_bits(isa: str, pattern: str, kernel: tuple[int, int]) -> None:
    same_bits_in_both_formats(isa, pattern, kernel, rows=37, inputs=80, lead=(2, 9, 10))


@each_isa
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "1:2", "1:4", "2:8", "4:16"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("height", [10, 13, 19, 22, 37])
def test_a_panel_and_lanes_that_run_as_one_give_the_bits_of_the_panel(
    isa: str, pattern: str, kernel: tuple[int, int], height: int
) -> None:
    """Images of 100 to 370 pixels: whole units in lanes and a tail, one row or two along with each, and several blocks."""
    same_bits_in_both_formats(isa, pattern, kernel, rows=213, inputs=112 if kernel == (3, 2) else 592, lead=(1, height, 10))


def same_bits_in_both_formats(isa: str, pattern: str, kernel: tuple[int, int], **sizes: Any) -> None:
    product = Product(pattern=Pattern.parse(pattern), kernel=kernel, padding=(0, 1), residual=True, activation="relu", **sizes)
    in_rows, last = (replace(product, form=form).operands(0).result(LIBRARIES[isa]) for form in ("plain", "channels_last"))
    torch.testing.assert_close(in_rows, last, rtol=0, atol=0)


@each_isa
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "2:8", "2:16", "3:8"])
@pytest.mark.parametrize("inputs", [1024, 1072])
def test_a_token_gets_the_bits_of_each_tile_by_itself(isa: str, pattern: str, inputs: int, threads: Any) -> None:
    """1,205 rows are tasks of ten tiles, of which two may go at once; 1,100 are tasks of nine, where one stays alone."""
    threads(1)
    for rows in (1205, 1100):
        product = Product(pattern=Pattern.parse(pattern), rows=rows, inputs=inputs, lead=(1,), bias=False)
        whole = product.operands(0)
        values, codes = whole.packed.values, whole.packed.codes
        alone = []
        for at in range(values.shape[1]):
            part = replace(whole.packed, values=values[:, at : at + 1], codes=codes[:, at : at + 1], shape=(16, inputs))
            alone.append(replace(whole, packed=part).result(LIBRARIES[isa]))
        assert torch.equal(whole.result(LIBRARIES[isa]), torch.cat(alone, -1)[:, :rows])


SAME = [
    Product(pattern=Pattern(2, 4), rows=100, inputs=64, lead=(7,), activation="gelu"),
    Product(pattern=Pattern(2, 4), rows=100, inputs=64, lead=(300,), residual=True, activation="silu"),
    Product(pattern=Pattern(2, 4), rows=232, inputs=176, lead=(301,), residual=True, activation="gelu"),
    Product(pattern=Pattern(2, 8), rows=200, inputs=560, lead=(130,), values=torch.int8),
    Product(pattern=Pattern(3, 7), rows=40, inputs=70, lead=(26,), values=torch.int8),
    Product(
        pattern=Pattern(1, 8), rows=24, inputs=16, lead=(2, 9, 11), kernel=(3, 3), padding=(1, 1), groups=2, residual=True
    ),
    Product(pattern=Pattern(2, 4), rows=48, inputs=16, lead=(1, 7, 7), kernel=(1, 1), form="channels_last"),
    Product(
        pattern=Pattern(2, 4),
        rows=40,
        inputs=48,
        lead=(2, 11, 13),
        kernel=(3, 3),
        stride=(2, 1),
        groups=2,
        residual=True,
        form="channels_last",
    ),
]


@each_isa
@pytest.mark.parametrize("product", SAME, ids=range(len(SAME)))
def test_one_two_and_three_threads_give_the_same_bits(isa: str, product: Product, threads: Any) -> None:
    operands, found = product.operands(0), []
    for count in (1, 2, 3):
        threads(count)
        found += [operands.result(LIBRARIES[isa]) for _ in range(2)]
    assert all(torch.equal(found[0], each) for each in found)


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP")
def test_the_threads_are_torchs_own() -> None:
    assert _parallel()


def test_eight_python_threads_at_once_get_what_one_gets(threads: Any) -> None:
    everything = [product.operands(seed) for seed in range(4) for product in SAME]
    wanted = [each.result(BEST) for each in everything]
    threads(2)
    with running_on(BEST), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: Operands.result(each, BEST), everything * 8))
    assert all(torch.equal(y, wanted[number % len(wanted)]) for number, y in enumerate(found))


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A child that imports what the tests do."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    given = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **environment}
    return subprocess.run([sys.executable, *words], env=given, capture_output=True, text=True, timeout=300, check=False)


# -- bits -------------------------------------------------------------------------------------------------------------------


@given(pattern=patterns(), rows=st.integers(1, 40), blocks=st.integers(1, 5), groups=st.integers(1, 3), kernel=st.sampled_from([(), (1,), (3, 2)]), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_weight_comes_back_from_its_packed_form_to_the_bit(
    pattern: Pattern, rows: int, blocks: int, groups: int, kernel: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = sparse((groups * rows, blocks * pattern.m, *kernel), pattern)
    before = weight.clone()
    packed = pack(weight, pattern, conv_groups=groups)
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(weight, before)
    rounded = pack(weight, pattern, conv_groups=groups, dtype=torch.bfloat16)
    assert torch.equal(unpack(rounded), weight.bfloat16().float())
    int8 = unpack(pack(weight, pattern, conv_groups=groups, dtype=torch.int8))
    step = weight.abs().flatten(1).amax(1) / 127
    assert bool(((int8 - weight).abs().flatten(1) <= step[:, None] * 0.501).all())
    steps = weight[0].numel() // pattern.m * pattern.n
    assert packed.values.numel() == groups * math.ceil(rows / 16) * 16 * steps
    assert packed.codes.numel() == packed.values.numel() // steps * math.ceil(steps * code_bits(pattern.m) / 32)


@each_isa
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "2:5", "3:32"])
def test_nan_and_inf_reach_the_outputs_whose_weights_are_kept_and_no_others(isa: str, tokens: int, pattern: str) -> None:
    """Dense products make NaN of 0 * inf: here a pruned position is not read. Nor does a token see another one."""
    at = Pattern.parse(pattern)
    weight = sparse((37, at.m * 3), at)
    kept = unpack_kept(weight, at)
    packed = pack(weight, at)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in (0, at.m - 1, at.m, 3 * at.m - 1):
            x = torch.randn(tokens, at.m * 3)
            x[tokens // 2, place] = bad
            with running_on(LIBRARIES[isa]):
                y = packed_linear(x, packed.values, packed.codes, None, None, None, [at.n, at.m], 37, "")
            wrong = ~y.isfinite()
            assert not wrong[torch.arange(tokens) != tokens // 2].any()
            reached = weight[:, place] != 0
            assert bool(wrong[tokens // 2][reached].all())
            assert not wrong[tokens // 2][~kept[:, place]].any()
            if not math.isnan(bad):
                assert torch.equal(y[tokens // 2][reached], bad * weight[reached, place])


def unpack_kept(weight: Tensor, pattern: Pattern) -> Tensor:
    """Positions that the packed weight holds, zeros among them where a group has fewer non-zeros."""
    packed = pack(weight, pattern)
    return unpack(replace(packed, values=torch.ones_like(packed.values))) != 0


@each_isa
@pytest.mark.parametrize("tokens", [2, 40])
def test_activations_of_extreme_sums_are_torchs(isa: str, tokens: int) -> None:
    at = Pattern(1, 2)
    packed = pack(torch.tensor([[1.0, 0.0]] * 16), at)
    small, large = [0.0, -0.0, 1e-40, -1e-30, 1e-3, 5.0, -5.0, 12.0, -12.0], [90.0, -90.0, 1e6, -1e6, 1e30, 3e38, -1e38, -3e38]
    numbers = torch.tensor([*small, *large, torch.inf, -torch.inf, torch.nan])
    for name, activation in ACTIVATIONS.items():
        for x in numbers.split(tokens):
            data = torch.stack([x, torch.zeros_like(x)], -1)
            with running_on(LIBRARIES[isa]):
                y = packed_linear(data, packed.values, packed.codes, None, None, None, [1, 2], 16, name)
            wanted = activation(x.double()).float()[:, None].expand(-1, 16)
            torch.testing.assert_close(y, wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


@each_isa
@pytest.mark.parametrize("tokens", [2, 40])
def test_denormals_are_numbers(isa: str, tokens: int) -> None:
    at = Pattern(2, 4)
    weight = sparse((20, 16), at).sign()
    x = torch.randint(-5, 6, (tokens, 16)) * 2.0**-149
    packed = pack(weight, at)
    with running_on(LIBRARIES[isa]):
        y = packed_linear(x, packed.values, packed.codes, None, None, None, [2, 4], 20, "")
    assert torch.equal(y.double(), x.double() @ weight.double().t())
    assert bool((y != 0).any())


# -- memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_nothing_is_touched_outside_the_buffers_and_a_forked_child_computes_the_same() -> None:
    """Every buffer ends, or begins, exactly at a page that kills the process when it is touched."""
    done = python(str(Path(__file__).with_name("guarded.py")))
    assert not done.returncode, f"{done.returncode}: {done.stdout[-500:]} {done.stderr[-2000:]}"
    assert done.stdout.split() == [*LIBRARIES, "fork"]


# -- what is refused --------------------------------------------------------------------------------------------------------

SMALL = Product(pattern=Pattern(2, 5), rows=20, inputs=20, lead=(3,), residual=True)
IMAGE = Product(pattern=Pattern(2, 4), rows=4, inputs=8, lead=(2, 5, 6), kernel=(3, 2), groups=2, residual=True)


@each_isa
@pytest.mark.parametrize("product", [
    SMALL, replace(SMALL, lead=(50,)), replace(SMALL, pattern=Pattern(1, 2)), replace(SMALL, pattern=Pattern(2, 20), lead=(70,)),
    replace(IMAGE, pattern=Pattern(1, 2)), replace(SMALL, pattern=Pattern(2, 20)),
], ids=str)  # fmt: skip
def test_a_code_beyond_its_group_is_an_error_and_not_a_read(isa: str, product: Product) -> None:
    operands = product.operands(0)
    operands.packed.codes.view(-1)[-16] = -1
    with pytest.raises(nm.NMError, match="names a position beyond its group: its buffers were changed"):
        operands.result(LIBRARIES[isa])


@each_isa
@pytest.mark.parametrize("pattern", ["1:8", "2:8", "3:8"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 60])
def test_one_bit_of_one_code_of_eight_is_found_wherever_it_lies(isa: str, pattern: str, tokens: int) -> None:
    """Words of codes are looked at whole where few tokens read them."""
    product = Product(pattern=Pattern.parse(pattern), rows=530, inputs=128, lead=(tokens,))
    operands = product.operands(0)
    codes = operands.packed.codes.view(-1)
    for place in random.Random(0).sample(range(codes.numel()), 12):
        right = int(codes[place])
        codes[place] = right ^ 1 << 4 * (place % 7) + 3
        with pytest.raises(nm.NMError, match="names a position beyond its group: its buffers were changed"):
            operands.result(LIBRARIES[isa])
        codes[place] = right
    operands.result(LIBRARIES[isa])


@each_isa
@pytest.mark.parametrize("pattern", ["2:4", "3:16"])
def test_any_code_of_a_pattern_without_room_for_a_wrong_one_stays_inside_its_group(isa: str, pattern: str) -> None:
    at = Pattern.parse(pattern)
    for lead in ((3,), (60,)):
        operands = Product(pattern=at, rows=20, inputs=at.m * 2, lead=lead).operands(0)
        operands.packed.codes.random_(-(2**31), 2**31 - 1)
        assert bool(operands.result(LIBRARIES[isa]).isfinite().all())


def linear_arguments() -> dict[str, Any]:
    operands = SMALL.operands(0)
    packed = operands.packed
    return {
        "x": operands.x, "values": packed.values, "codes": packed.codes, "scales": None, "bias": operands.bias,
        "residual": operands.residual, "pattern": [2, 5], "rows": 20, "activation": "",
    }  # fmt: skip


def conv_arguments() -> dict[str, Any]:
    operands = IMAGE.operands(0)
    packed = operands.packed
    return {
        "x": operands.x, "values": packed.values, "codes": packed.codes, "scales": None, "bias": operands.bias,
        "residual": operands.residual, "pattern": [2, 4], "rows": 8, "kernel": [3, 2], "stride": [1, 1], "padding": [0, 0],
        "dilation": [1, 1], "groups": 2, "activation": "",
    }  # fmt: skip


BOTH: dict[str, Any] = {
    "x of float64": {"x": lambda x: x.double()},
    "x of whole numbers": {"x": lambda x: x.int()},
    "x on meta": {"x": lambda x: x.to("meta")},
    "values on meta": {"values": lambda v: v.to("meta")},
    "codes on meta": {"codes": lambda c: c.to("meta")},
    "a bias on meta": {"bias": lambda b: b.to("meta")},
    "a residual on meta": {"residual": lambda r: r.to("meta")},
    "too few values": {"values": lambda v: v[:, :, :-1]},
    "values with gaps": {"values": lambda v: torch.stack([v, v], -1)[..., 0]},
    "values of float16": {"values": lambda v: v.half()},
    "int8 values without scales": {"values": lambda v: v.to(torch.int8)},
    "scales without int8 values": {"scales": lambda _: torch.ones(1, 2, 16)},
    "too few codes": {"codes": lambda c: c[:, :, :-1].contiguous()},
    "codes of int64": {"codes": lambda c: c.long()},
    "a bias that is short": {"bias": lambda b: b[:-1]},
    "a bias of bfloat16": {"bias": lambda b: b.bfloat16()},
    "a residual of another shape": {"residual": lambda r: r[:1]},
    "a residual of whole numbers": {"residual": lambda r: r.int()},
    "an activation that there is not": {"activation": lambda _: "tanh"},
    "a pattern that is none": {"pattern": lambda _: [4, 2]},
    "a pattern of one number": {"pattern": lambda _: [4]},
    "another number of rows": {"rows": lambda rows: rows - 1},
    "no rows": {"rows": lambda _: 0},
}
LINEAR = {"x with other features": {"x": lambda x: x[:, :10]}, "x without axes": {"x": lambda x: x[0, 0]}}
CONV = {
    "x with other channels": {"x": lambda x: x[:, :8]},
    "x without a batch": {"x": lambda x: x[0]},
    "an image smaller than the kernel": {"x": lambda x: x[:, :, :2]},
    "a stride of zero": {"stride": lambda _: [0, 1]},
    "a negative padding": {"padding": lambda _: [-1, 0]},
    "a dilation of zero": {"dilation": lambda _: [1, 0]},
    "one number for two axes": {"stride": lambda _: [1]},
    "another kernel": {"kernel": lambda _: [3, 3]},
    "no conv groups": {"groups": lambda _: 0},
    "conv groups that do not divide": {"groups": lambda _: 3},
}


@pytest.mark.parametrize("case", [*BOTH, *LINEAR])
def test_a_linear_that_does_not_fit_is_refused_before_anything_is_read(case: str) -> None:
    refused(packed_linear, linear_arguments(), {**BOTH, **LINEAR}[case])


@pytest.mark.parametrize("case", [*BOTH, *CONV])
def test_a_convolution_that_does_not_fit_is_refused_before_anything_is_read(case: str) -> None:
    refused(packed_conv2d, conv_arguments(), {**BOTH, **CONV}[case])


def refused(op: Any, arguments: dict[str, Any], changes: dict[str, Any]) -> None:
    assert op(**arguments).isfinite().all()
    with pytest.raises(nm.NMError):
        op(**{**arguments, **{name: change(arguments[name]) for name, change in changes.items()}})


@pytest.mark.parametrize("change", [
    {"pattern": Pattern(2, 33)}, {"dtype": torch.float16}, {"conv_groups": 3}, {"pattern": Pattern(1, 4)}, {"pattern": Pattern(2, 6)},
], ids=str)  # fmt: skip
def test_a_weight_that_cannot_be_packed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(nm.NMError, match="a weight of"):
        pack(torch.ones(8, 32) * torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(8), **{"pattern": Pattern(2, 4), **change})


@pytest.mark.parametrize("tokens", [3, 50])
def test_a_weight_without_inputs_is_refused(tokens: int) -> None:
    packed = pack(torch.ones(8, 0), Pattern(2, 4))
    with pytest.raises(nm.NMError, match="do not fit"):
        packed_linear(torch.ones(tokens, 0), packed.values, packed.codes, None, None, None, [2, 4], 8, "")


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(nm.NMError, match="choose one of portable, avx2, avx512"):
        load("sse")


# -- shipping ---------------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_packed_weight_computes_the_same() -> None:
    operands = SMALL.operands(0)
    assert torch.equal(copy.deepcopy(operands).result(BEST), operands.result(BEST))
    assert isinstance(BEST, Library)
    assert functional.linear(operands.x, unpack(operands.packed)).shape == operands.result(BEST).shape
