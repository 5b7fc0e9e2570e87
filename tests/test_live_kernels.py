# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Compiled work on masks and live sets gives what torch operations give, for any pattern, layout and dtype."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nm_compiler.layout import as_rows
from nm_compiler.pattern import Pattern, combination_table
from nm_compiler.solvers import live as live_module
from nm_compiler.solvers import select as select_module
from nm_compiler.solvers import sweeps
from nm_compiler.solvers.combinations import byte_table, pack, union
from nm_compiler.solvers.combinations import retire as retire_by_torch
from nm_compiler.solvers.live import cover, gradients, retire
from nm_compiler.solvers.select import keep

LAYOUTS = ["linear", "transposed", "conv", "channels_last", "conv1d", "experts", "experts_turned"]
FLOAT = torch.float32
cases = st.sampled_from(  # few of them, since a kernel takes a second to compile: one pattern in every layout
    [
        *((Pattern(2, 4), FLOAT, layout) for layout in LAYOUTS),
        *((Pattern(n, m), FLOAT, "linear") for n, m in ((4, 8), (1, 16), (3, 5))),
        (Pattern(2, 4), torch.float64, "linear"),
    ]
)


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """By numba: tests/test_sweeps.py has the kernels in C."""
    monkeypatch.setattr(live_module, "_SMALL", 0)
    monkeypatch.setattr(select_module, "_SMALL", 0)
    monkeypatch.setattr(sweeps, "kernels", lambda: None)


def weight(layout: str, m: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, list[int]]:
    """Small whole numbers, so that sums are exact in any order and ties are common; rows as in `Layout.rows`."""
    draw = torch.Generator().manual_seed(seed)
    shape, rows = {
        "linear": ((5, 3 * m), [0, 1]),
        "transposed": ((3 * m, 5), [1, 0]),
        "conv": ((4, 2 * m, 3, 2), [0, 2, 3, 1]),
        "channels_last": ((4, 2 * m, 3, 2), [0, 2, 3, 1]),
        "conv1d": ((4, m, 3), [0, 2, 1]),
        "experts": ((3, 4, 2 * m), [0, 1, 2]),
        "experts_turned": ((3, 2 * m, 4), [0, 2, 1]),
    }[layout]
    made = torch.randint(-3, 4, shape, generator=draw).to(dtype)
    return made.to(memory_format=torch.channels_last) if layout == "channels_last" else made, rows


def live_sets(like: Tensor, rows: list[int], layout: str, pattern: Pattern, seed: int) -> Tensor:
    leading = 2 if layout.startswith("experts") else 1
    viewed = as_rows(like, rows)
    groups = viewed[(0,) * leading].numel() // pattern.m
    draw = torch.Generator().manual_seed(seed)
    share = torch.rand(*viewed.shape[:leading], groups, 1, generator=draw)
    bits = torch.rand(*viewed.shape[:leading], groups, pattern.combinations, generator=draw) < share
    bits[..., 0] |= ~bits.any(-1)
    return pack(bits)


@settings(max_examples=80, deadline=None)
@given(cases, st.integers(0, 2**31))
def test_kernels_cover_send_gradients_and_retire_as_torch_does(case: Any, seed: int) -> None:
    pattern, dtype, layout = case
    value, rows = weight(layout, pattern.m, dtype, seed)
    live, table = live_sets(value, rows, layout, pattern, seed), byte_table(pattern)
    mask = torch.zeros(value.shape, dtype=torch.bool)
    expected = torch.empty_like(mask)
    by_row = as_rows(expected, rows)
    by_row.copy_(union(live, table).view(by_row.shape))
    if cover(live, table, as_rows(mask, rows)):
        assert torch.equal(mask, expected)
    mask = expected
    assert torch.equal(keep(value, mask), value * mask)
    assert keep(value, mask).stride() == value.stride()

    grad, _ = weight(layout, pattern.m, dtype, seed + 1)
    ours = torch.ops.nm.score_weight_backward(grad, value, live, table, 1, rows, True)
    choice = torch.tensor([sum(int(byte).bit_count() for byte in group) > 1 for group in live.flatten(0, -2).tolist()])
    dw = grad * mask
    by_group = as_rows(value * dw, rows).unflatten(-1, (-1, pattern.m))
    ds = (by_group * choice.view(*by_group.shape[:-1], 1)).flatten(-2)
    assert torch.equal(ours[0], dw)
    assert torch.equal(as_rows(ours[1], rows), ds)

    scores = as_rows(grad, rows)
    for left in {1, max(1, pattern.combinations // 2), pattern.combinations - 1}:
        found = retire(scores, live, pattern, left)
        if found is not None:
            wide = retire_by_torch(scores, live, combination_table(pattern), keep=left, by_position=True)
            assert torch.equal(found, wide), (left, found, wide)


def test_the_usual_layouts_have_kernels_and_fake_tensors_have_none() -> None:
    pattern = Pattern(2, 4)
    for layout in ("linear", "conv", "channels_last", "experts"):
        value, rows = weight(layout, 4, torch.float32, 0)
        live, viewed = live_sets(value, rows, layout, pattern, 0), as_rows(value, rows)
        mask = torch.zeros(value.shape, dtype=torch.bool)
        assert cover(live, byte_table(pattern), as_rows(mask, rows)), layout
        results = torch.empty_like(value), torch.empty_like(value)
        assert gradients(viewed, viewed, live, byte_table(pattern), tuple(as_rows(r, rows) for r in results)), layout
        assert retire(viewed, live, pattern, 1) is not None, layout
    assert not cover(live.to("meta"), byte_table(pattern), torch.zeros(value.shape, dtype=torch.bool, device="meta"))
    assert retire(viewed.to("meta"), live.to("meta"), pattern, 1) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_kept_value_is_itself_to_the_bit_and_nothing_leaks_through_the_mask(dtype: torch.dtype) -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1.5] * 8, dtype=dtype)
    mask = torch.tensor([True, False] * 16)
    kept = keep(values, mask)
    assert torch.equal(kept.view(torch.uint8), torch.where(mask, values, torch.zeros((), dtype=dtype)).view(torch.uint8))
    assert torch.equal(keep(values, ~mask).isinf(), ~mask & values.isinf())


def test_scores_that_are_not_finite_rank_below_all_others_but_above_what_has_retired() -> None:
    pattern = Pattern(1, 4)
    scores = torch.tensor([[float("nan"), 1.0, float("-inf"), float("inf")]])
    for live_bits, keep_count, left in (
        ([1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([1, 0, 1, 0], 1, [1, 0, 0, 0]),
        ([1, 1, 0, 0], 1, [0, 1, 0, 0]),
    ):
        live = pack(torch.tensor(live_bits).bool()).view(1, 1, 1)
        for result in (
            retire(scores, live, pattern, keep_count),
            retire_by_torch(scores, live, combination_table(pattern), keep=keep_count, by_position=True),
        ):
            assert torch.equal(result, pack(torch.tensor(left).bool()).view(1, 1, 1)), (live_bits, keep_count)


def test_large_weights_are_split_over_threads_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from nm_compiler.solvers import threads

    pattern, value = Pattern(4, 8), torch.randn(64, 64)
    live = live_sets(value, [0, 1], "linear", pattern, 3)
    alone: Any = retire(value, live, pattern, 5)
    monkeypatch.setattr(threads, "_LARGE", 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(alone, retire(value, live, pattern, 5))
