# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The C kernels for masks and live sets give torch's bits, on every instruction set, for any pattern, layout and value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed_products import libraries
from sweep_cases import HALF, LAYOUTS, REAL, Case, bits, check_decay, check_live, check_masks, check_sums, swept_by
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import MAX_TABLE, Pattern, combination_table
from nm_compiler.runtime.native.library import load
from nm_compiler.solvers import sweeps
from nm_compiler.solvers.combinations import pack, retire
from nm_compiler.solvers.masks import keep_largest, masked, top_mask
from nm_compiler.solvers.select import decayed

LIBRARIES = libraries()
pytestmark = pytest.mark.skipif(not LIBRARIES, reason=f"no CPU kernels here: {load()}")
each_isa = pytest.mark.parametrize("isa", list(LIBRARIES))


@st.composite
def cases(draw: Any, dtypes: tuple[torch.dtype, ...], most: int) -> Case:
    m = draw(st.sampled_from([2, 4, 8, 16]) | st.integers(2, most))
    return Case(
        pattern=Pattern(draw(st.integers(1, m - 1)), m), layout=draw(st.sampled_from(LAYOUTS)), dtype=draw(st.sampled_from(dtypes)),
        values=draw(st.sampled_from(["random", "whole", "odd"])), seed=draw(st.integers(0, 10**6)),
        size=(draw(st.integers(1, 9)), draw(st.integers(1, 40) | st.sampled_from([64, 66, 96]))),
    )  # fmt: skip


@each_isa
@settings(deadline=None, max_examples=100)
@given(case=cases(REAL + HALF, 32))
def test_masks_and_masked_weights_are_torchs_to_the_bit_with_ties_nan_infinities_and_denormals(isa: str, case: Case) -> None:
    check_masks(case, LIBRARIES[isa])


@each_isa
@settings(deadline=None, max_examples=60)
@given(case=cases(REAL, 9))
def test_live_sets_cover_send_gradients_and_retire_as_in_torch(isa: str, case: Case) -> None:
    assume(case.pattern.combinations <= MAX_TABLE)
    check_live(case, LIBRARIES[isa])


@each_isa
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_sums_of_the_larger_bytes_are_torchs(isa: str, seed: int) -> None:
    check_sums(seed, LIBRARIES[isa])


@pytest.mark.ci(here=["1:31"])
@each_isa
@pytest.mark.parametrize("text", ["1:16", "3:12", "1:31", "2:32", "4:16"])
def test_wide_groups_cover_send_gradients_and_retire_as_in_torch(isa: str, text: str) -> None:
    for layout in LAYOUTS:
        for values in ("whole", "odd"):
            check_live(Case(pattern=Pattern.parse(text), layout=layout, dtype=torch.float32, values=values, size=(2, 5), seed=3), LIBRARIES[isa])  # fmt: skip


@pytest.mark.ci(here=["2:4", "1:32", "2:5"])
@each_isa
@pytest.mark.parametrize("text", ["2:4", "2:5", "4:8", "1:32", "2:16"])
def test_groups_that_lie_thousands_of_numbers_apart_cover_send_gradients_and_retire_as_in_torch(isa: str, text: str) -> None:
    for layout, size in (("transposed", (3, 2_100)), ("experts_turned", (2, 1_030)), ("conv", (3, 40))):
        for dtype in REAL:
            case = Case(pattern=Pattern.parse(text), layout=layout, dtype=dtype, values="whole", size=size, seed=5)
            check_live(case, LIBRARIES[isa])


SCORES = {
    "random": lambda shape, draw: torch.randn(shape, generator=draw),
    "often equal": lambda shape, draw: torch.randint(-2, 3, shape, generator=draw).float(),
    "all equal": lambda shape, draw: torch.full(shape, -0.7),
    "of many sizes": lambda shape, draw: (
        torch.randn(shape, generator=draw) * 2.0 ** torch.randint(-11, 11, shape, generator=draw)
    ),
    "one far off": lambda shape, draw: torch.where(
        torch.rand(shape, generator=draw) < 0.1, 1e9 * torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    ),
}


@pytest.mark.ci
@each_isa
@pytest.mark.parametrize("values", list(SCORES))
@pytest.mark.parametrize("text", ["4:8", "2:8", "3:8", "5:8", "4:9", "1:31", "4:16"])
def test_retiring_one_combination_at_a_time_takes_the_lowest_and_of_equals_the_last(isa: str, text: str, values: str) -> None:
    pattern, draw = Pattern.parse(text), torch.Generator().manual_seed(11)
    table, live = combination_table(pattern), pack(torch.ones(5, 7, pattern.combinations, dtype=torch.bool))
    steps = min(pattern.combinations - 1, 80)
    for left in range(pattern.combinations - 1, pattern.combinations - 1 - steps, -1):
        scores = SCORES[values]((5, 7 * pattern.m), draw)
        with swept_by(LIBRARIES[isa]):
            found = sweeps.retire(scores, live, pattern, left)
        assert found is not None
        assert torch.equal(found, retire(scores.double(), live, table, keep=left, by_position=True))
        live = found


@each_isa
@settings(deadline=None, max_examples=30)
@given(case=cases(REAL, 9))
def test_the_pull_of_pruned_weights_rounds_three_times_as_torch_does(isa: str, case: Case) -> None:
    check_decay(case, LIBRARIES[isa])


@pytest.mark.ci
@each_isa
def test_weights_beyond_one_part_are_the_same_on_one_and_on_three_threads(isa: str, threads: Any) -> None:
    for count in (1, 3):
        threads(count)
        for text, layout, size in (
            ("2:4", "linear", (300, 1500)),
            ("4:8", "conv", (30, 1100)),
            ("1:4", "transposed", (300, 1200)),
        ):
            case = Case(pattern=Pattern.parse(text), layout=layout, dtype=torch.float32, values="whole", size=size, seed=count)
            check_masks(case, LIBRARIES[isa])
            check_decay(case, LIBRARIES[isa])
            if text != "4:8":
                check_live(case, LIBRARIES[isa])


@each_isa
@pytest.mark.parametrize("aside", [0, 1])
def test_a_large_weight_sends_its_gradient_past_the_caches_to_any_address(isa: str, aside: int) -> None:
    def place(name: str, tensor: Tensor) -> Tensor:
        room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
        return room[aside:].as_strided(tensor.shape, tensor.stride()) if name == "out" else tensor

    case = Case(pattern=Pattern(2, 4), layout="linear", dtype=torch.float32, values="whole", size=(130, 1030), seed=3)
    assert case.weight().numel() > 2**19
    check_live(case, LIBRARIES[isa], place)


@pytest.mark.ci
@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masks_too_large_for_the_caches_are_the_same_on_one_and_on_three_threads(
    isa: str, dtype: torch.dtype, threads: Any
) -> None:
    for text, size, count in (("2:4", (700, 1600), 1), ("1:16", (175, 1600), 3)):
        threads(count)
        case = Case(pattern=Pattern.parse(text), layout="linear", dtype=dtype, values="whole", size=size, seed=count)
        check_masks(case, LIBRARIES[isa])


@pytest.mark.parametrize("text", ["2:4", "3:5", "4:8", "1:16", "5:32", "7:40"])
def test_without_the_kernels_the_results_are_the_same(text: str) -> None:
    pattern = Pattern.parse(text)
    for layout in ("linear", "conv"):
        case = Case(pattern=pattern, layout=layout, dtype=torch.float32, values="odd", size=(9, 120), seed=1)
        weight = case.weight()
        ours = [top_mask(weight, pattern=text, axis=1), bits(masked(weight, pattern=text, axis=1))]
        with swept_by(None):
            theirs = [top_mask(weight, pattern=text, axis=1), bits(masked(weight, pattern=text, axis=1))]
        assert all(map(torch.equal, ours, theirs))


def test_a_backward_weight_is_the_same_with_ordered_rows_in_place_and_with_copies_of_them() -> None:
    """Experts, their output axis first or last."""
    for shape, rows in (((64, 96), [0, 1]), ((96, 64), [1, 0]), ((3, 64, 96), [0, 1, 2]), ((64, 24, 3, 3), [0, 2, 3, 1])):
        weight = torch.randn(shape)
        out = len(weight) if rows[0] == 0 and len(shape) != 3 else 64
        order = torch.stack([torch.randperm(out) for _ in range(3)]) if len(shape) == 3 else torch.randperm(out)
        ours = torch.ops.nm.backward_weight(weight, order, 2, 4, rows)
        with swept_by(None):
            assert torch.equal(torch.ops.nm.backward_weight(weight, order, 2, 4, rows), ours)


@pytest.mark.parametrize("order", [[0, 1, 2, 4], [-1, 0, 1, 2]])
def test_an_order_that_names_rows_that_are_not_there_is_not_followed(order: list[int]) -> None:
    weight, out = torch.randn(4, 64), torch.zeros(4, 64)
    assert not sweeps.largest_rows(weight, torch.tensor(order), Pattern(2, 4), out)
    assert not out.any()


def test_what_has_no_kernel_is_left_to_others() -> None:
    pattern, out = Pattern(2, 4), torch.empty(8, 8)
    library = next(iter(LIBRARIES.values()))
    with swept_by(library):
        for weight in (torch.randn(8, 16)[:, ::2], torch.randn(8, 8, device="meta"), torch.randn(8, 8).to_sparse()):
            assert not sweeps.largest(weight, pattern, 1, out)
        assert not sweeps.largest(torch.randn(8, 80), Pattern(2, 40), 1, torch.empty(8, 80))
        assert sweeps.decay(out.half(), out.half(), out.half(), 0.1) is None
        assert sweeps.decay(out, out.t(), out, 0.1) is None
        live = torch.full((8, 2, 1), 63, dtype=torch.uint8)
        assert sweeps.retire(torch.randn(8, 8).bfloat16(), live, pattern, 3) is None
        assert sweeps.retire(torch.randn(8, 16)[:, ::2], live, pattern, 3) is None
    half = torch.randn(256, 256).half()
    assert torch.equal(keep_largest(half, 2, 4, 1), half * top_mask(half, pattern="2:4"))


def test_the_pull_of_pruned_weights_can_be_differentiated_again() -> None:
    grad, weight = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
    assert decayed(grad, weight, weight, 0.1).requires_grad
    with torch.no_grad():
        assert torch.equal(decayed(grad, weight, torch.zeros(8, 8), 0.5), weight * 0.5 + grad)


def test_an_unknown_instruction_set_is_refused_by_masks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    load.cache_clear()
    monkeypatch.setenv("NM_COMPILER_ISA", "sse")
    with pytest.raises(NMError, match="choose one of portable, avx2, avx512"):
        top_mask(torch.randn(4, 4), pattern="2:4")
    load.cache_clear()
