# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_force_mask

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern, combination_table
from nm_compiler.solvers.backward_order import assignment_search, kept_importance, search_backward_order
from nm_compiler.solvers.check import worst_group
from nm_compiler.solvers.combinations import byte_table, count, pack, retire, undecided, union, unpack
from nm_compiler.solvers.magnitude import _by_comparing_all, _by_comparison, magnitude_mask

small = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 16), (8, 16), (5, 7)])


@settings(deadline=None)
@given(small, st.integers(0, 2), st.integers(0, 10**6), st.booleans())
def test_the_magnitude_mask_agrees_with_brute_force_ties_included(
    nm: tuple[int, int], axis: int, seed: int, tied: bool
) -> None:
    n, m = nm
    shape = [2, 3, 2]
    shape[axis] = 2 * m
    rng = np.random.default_rng(seed)
    weight = rng.integers(-2, 3, shape).astype(np.float64) if tied else rng.standard_normal(shape)
    mask = magnitude_mask(torch.from_numpy(weight), n, m, axis)
    np.testing.assert_array_equal(mask.numpy(), brute_force_mask(weight, n, m, axis))


@settings(deadline=None)
@given(small, st.integers(0, 10**6), st.booleans(), st.booleans())
def test_comparing_all_at_once_as_on_a_gpu_gives_the_same_mask(
    nm: tuple[int, int], seed: int, tied: bool, spoilt: bool
) -> None:
    n, m = nm
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(3, 2, m, generator=generator).abs()
    groups = groups.mul(2).round() if tied else groups
    if spoilt:
        groups[torch.rand(groups.shape, generator=generator) < 0.2] = torch.nan
    kept, wanted = torch.empty(2, *groups.shape, dtype=torch.bool)
    _by_comparing_all(groups, kept, n)
    _by_comparison(groups, wanted, n)
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_group_keeps_exactly_n_in_any_dtype_and_memory_layout(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 16, 3, 3).to(dtype)
    for view in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(0, 1).contiguous().transpose(0, 1)):
        mask = magnitude_mask(view, 2, 4, 1)
        assert mask.stride() == view.stride()
        assert bool((mask.unflatten(1, (4, 4)).sum(2) == 2).all())
        assert torch.equal(mask, magnitude_mask(weight, 2, 4, 1))


@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_packed_bits_unpack_to_what_they_were(bits: list[bool]) -> None:
    tensor = torch.tensor(bits)
    packed = pack(tensor)
    assert packed.shape == (-(-len(bits) // 8),)
    assert torch.equal(unpack(packed, len(bits)), tensor)


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "4:8", "2:8", "1:16", "1:3"])
def test_the_union_of_live_combinations_is_the_same_packed_and_unpacked(text: str) -> None:
    pattern = Pattern.parse(text)
    table = combination_table(pattern)
    live = torch.rand(5, 7, len(table)) < 0.3
    expected = torch.stack([table[row].any(0) for row in live.flatten(0, 1)]).view(5, 7, pattern.m)
    assert torch.equal(union(live.to(torch.uint8), table), expected)
    assert torch.equal(union(pack(live), byte_table(pattern)), expected)
    assert torch.equal(count(pack(live), packed=True), live.sum(-1))
    assert torch.equal(undecided(pack(live), packed=True, last=1), live.sum(-1) > 1)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["2:4", "1:4", "2:8", "4:8"]), st.integers(0, 10**6), st.data())
def test_retiring_keeps_the_best_scored_of_the_live_and_revives_none(text: str, seed: int, data: st.DataObject) -> None:
    pattern = Pattern.parse(text)
    table = combination_table(pattern)
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(3, 4, len(table), generator=generator) < 0.7
    live[..., 0] = True
    keep = data.draw(st.integers(1, len(table)))
    scores = torch.randn(3, 4 * pattern.m, generator=generator, dtype=torch.float64)
    totals = scores.view(3, 4, pattern.m) @ table.double().T
    kept = unpack(retire(scores, pack(live), table, keep=keep, by_position=True), len(table))
    same = retire(totals, live.to(torch.uint8), table, keep=keep, by_position=False).bool()
    assert torch.equal(kept, same)
    assert not bool((kept & ~live).any())
    assert torch.equal(kept.sum(-1), live.sum(-1).clamp(max=keep))
    worst_kept = totals.masked_fill(~kept, torch.inf).min(-1).values
    best_lost = totals.masked_fill(kept | ~live, -torch.inf).max(-1).values
    assert bool((worst_kept >= best_lost).all())


def test_a_group_with_nan_scores_still_keeps_what_it_must() -> None:
    table = combination_table(Pattern(2, 4))
    live = torch.ones(1, 2, 6, dtype=torch.uint8)
    scores = torch.full((1, 8), torch.nan)
    scores[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    kept = retire(scores, live, table, keep=1, by_position=True)
    assert kept.sum(-1).tolist() == [[1, 1]]
    assert kept[0, 0].tolist() == [1, 0, 0, 0, 0, 0]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]), st.integers(1, 5), st.integers(0, 10**6))
def test_a_searched_order_is_a_permutation_never_worse_than_identity_or_start(
    nm: tuple[int, int], groups: int, seed: int
) -> None:
    n, m = nm
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(groups * m, 9, generator=generator)
    start = torch.randperm(groups * m, generator=generator)
    found = assignment_search(importance, start, n, m, moves=60, seed=seed)
    assert torch.equal(found.sort().values, torch.arange(groups * m))
    for other in (start, torch.arange(groups * m)):
        assert float(kept_importance(importance, found, n, m)) >= float(kept_importance(importance, other, n, m))
    assert torch.equal(found, assignment_search(importance, start, n, m, moves=60, seed=seed))


def test_the_search_finds_the_best_order_of_a_tiny_matrix() -> None:
    importance = torch.rand(6, 4, dtype=torch.float64)
    best = max(float(kept_importance(importance, torch.tensor(p), 1, 2)) for p in itertools.permutations(range(6)))
    found = assignment_search(importance, torch.arange(6), 1, 2, moves=200, seed=0)
    assert float(kept_importance(importance, found, 1, 2)) == pytest.approx(best)


def test_the_search_beats_the_papers_hundred_random_orders() -> None:
    weight = torch.randn(128, 256)
    importance = weight.abs() * magnitude_mask(weight, 2, 4, 1)
    random = max(float(kept_importance(importance, torch.randperm(128), 2, 4)) for _ in range(100))
    found = assignment_search(importance, torch.arange(128), 2, 4, moves=1000, seed=0)
    assert float(kept_importance(importance, found, 2, 4)) > 1.005 * random


def test_the_worst_group_is_counted_along_the_axis_asked_for() -> None:
    weight = torch.zeros(4, 8)
    weight[0, :3] = 1
    assert worst_group(weight, 4, 1) == 3
    assert worst_group(weight, 4, 0) == 1
    assert worst_group(torch.full((1, 4), torch.nan), 4, 1) == 4


@pytest.mark.parametrize("objective", ["magnitude", "count"])
def test_a_thorough_search_of_the_backward_order_keeps_more_than_the_quick_one_starts_with(objective: str) -> None:
    weight = torch.randn(48, 5, 16)
    mask = magnitude_mask(weight, 2, 4, -1)
    importance = (mask.float() if objective == "count" else weight.abs() * mask).flatten(1)
    quick = assignment_search(importance, torch.arange(48), 2, 4, moves=500, seed=0)
    found = search_backward_order(weight, pattern="2:4", objective=objective, order=quick, moves=300_000)
    kept = [float(kept_importance(importance, torch.as_tensor(o), 2, 4)) for o in (torch.arange(48), quick, found)]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize(("weight", "options", "message"), [
    (torch.ones(6, 8), {}, "must divide its first and its last axis"),
    (torch.ones(8, 6), {}, "must divide its first and its last axis"),
    (torch.ones(8, 8), {"objective": "sum"}, "choose 'magnitude' or 'count'"),
    (torch.full((8, 8), torch.nan), {}, "NaN"),
])  # fmt: skip
def test_a_backward_order_that_cannot_be_searched_is_refused(
    weight: torch.Tensor, options: dict[str, str], message: str
) -> None:
    with pytest.raises(NMError, match=message):
        search_backward_order(weight, **{"pattern": "2:4", **options})


def test_nan_in_training_leaves_the_order_as_it_is() -> None:
    importance = torch.rand(8, 4)
    importance[0, 0] = torch.nan
    order = torch.randperm(8)
    assert sorted(assignment_search(importance, order, 2, 4, moves=100, seed=0).tolist()) == list(range(8))
