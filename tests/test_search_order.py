# mypy: disable-error-code="arg-type,no-untyped-call"
import itertools
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers import search as search_module
from nm_compiler.solvers.neighbourhood_kernels import assign
from nm_compiler.solvers.search import search, search_order, snake
from nm_compiler.solvers.search_budget import Progress
from nm_compiler.solvers.search_kernels import kept_sum, max_sums, thresholds
from nm_compiler.solvers.search_members import Member, efficacy, retained

patterns = st.sampled_from(["1:2", "2:4", "1:4", "3:4", "2:3", "4:8", "2:8", "1:16"])


def matrix(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    """Magnitudes whose columns differ in scale, as those of a trained weight do."""
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_normal((rows, channels)) * rng.lognormal(0, 0.5, channels))


@pytest.fixture(params=["table", "assignment"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both searches, whatever the size: the limit between them is moved."""
    monkeypatch.setattr(search_module, "TABLE_UP_TO", 10**9 if request.param == "table" else 0)
    return str(request.param)


def partitions(channels: tuple[int, ...], m: int) -> Iterator[list[int]]:
    """Every way to share channels out to groups, once each, as an order."""
    if not channels:
        yield []
        return
    for rest in itertools.combinations(channels[1:], m - 1):
        left = tuple(c for c in channels[1:] if c not in rest)
        for tail in partitions(left, m):
            yield [channels[0], *rest, *tail]


@pytest.mark.ci(here=["2:4-8", "2:3-9"])
@pytest.mark.parametrize(("text", "channels"), [("2:4", 8), ("2:4", 12), ("1:2", 8), ("1:4", 12), ("2:3", 9), ("3:5", 10)])
def test_both_searches_find_the_best_order_of_a_tiny_matrix(text: str, channels: int, engine: str) -> None:
    for seed in range(2):
        values = matrix(5, channels, seed)
        m = Pattern.parse(text).m
        best = max(retained(values, order, pattern=text) for order in partitions(tuple(range(channels)), m))
        found = search_order(values, pattern=text, moves=60_000)
        assert retained(values, found, pattern=text) == pytest.approx(best, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(patterns, st.integers(1, 5), st.integers(0, 6), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_a_searched_order_is_a_permutation_that_keeps_no_less_than_identity_and_start(
    text: str, groups: int, rows: int, seed: int, tied: bool, table: bool
) -> None:
    channels = groups * Pattern.parse(text).m
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, (rows, channels)).astype(float) if tied else matrix(rows, channels, seed)
    start = rng.permutation(channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "TABLE_UP_TO", 10**9 if table else 0)
        found = search_order(values, pattern=text, moves=300, seed=seed, start=start)
    assert found.dtype == np.int64
    assert sorted(found) == list(range(channels))
    kept = retained(values, found, pattern=text)
    assert kept >= retained(values, pattern=text)
    assert kept >= retained(values, start, pattern=text)


def test_the_same_seed_and_moves_give_the_same_order_and_other_seeds_others(engine: str) -> None:
    values = matrix(20, 64)
    orders = [search_order(values, pattern="2:4", moves=100_000, seed=seed) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


def test_scaling_all_values_changes_nothing(engine: str) -> None:
    values = matrix(20, 32)
    expected = search_order(values, pattern="2:4", moves=50_000)
    for scale in (2.0**-90, 2.0**400, 2.0**-600):
        np.testing.assert_array_equal(search_order(values * scale, pattern="2:4", moves=50_000), expected)


def test_numpy_torch_half_precision_and_strided_views_all_work() -> None:
    values = matrix(12, 16).astype(np.float32)
    expected = search_order(values, pattern="2:4", moves=20_000)
    wide = np.zeros((24, 32), dtype=np.float32)
    wide[::2, ::2] = values
    flipped = np.ascontiguousarray(values[::-1])[::-1]
    same = [torch.from_numpy(values), values.astype(np.float64), wide[::2, ::2], np.asfortranarray(values), flipped,
            torch.from_numpy(values).requires_grad_(), values.tolist()]  # fmt: skip
    for each in same:
        np.testing.assert_array_equal(search_order(each, pattern=(2, 4), moves=20_000), expected)
    for dtype in (torch.float16, torch.bfloat16):
        half = torch.from_numpy(values).to(dtype)
        assert retained(half, search_order(half, pattern=Pattern(2, 4)), pattern="2:4") > retained(half, pattern="2:4")
    assert sorted(search_order(np.random.default_rng(0).integers(0, 9, (6, 8)), pattern="2:4")) == list(range(8))


def test_the_search_beats_identity_snake_and_a_hill_climb_by_far() -> None:
    values = np.abs(np.random.default_rng(7).standard_normal((64, 64)))
    table = search(values, pattern="2:4", moves=2_000_000)
    assert efficacy(values, table.order, pattern="2:4") > 0.48
    before = retained(values, pattern="2:4")
    assert table.gain == pytest.approx(retained(values, table.order, pattern="2:4") / before - 1, abs=1e-5)
    many = matrix(32, 640)
    dealt = snake(many.T.astype(np.float32), 4)
    found = search_order(many, pattern="2:4", moves=1_000_000)
    assert efficacy(many, found, pattern="2:4") > efficacy(many, dealt, pattern="2:4") + 0.1


def test_the_more_moves_the_better() -> None:
    values = matrix(48, 48)
    kept = [retained(values, search_order(values, pattern="1:4", moves=m), pattern="1:4") for m in (0, 5_000, 3_000_000)]
    assert kept[0] < kept[1] < kept[2]


def test_a_class_is_searched_for_the_weighted_sum_of_its_members() -> None:
    rng = np.random.default_rng(1)
    first, second = np.abs(rng.standard_normal((6, 16))), np.abs(rng.standard_normal((9, 16)))
    conv = np.abs(rng.standard_normal((4, 3, 3, 16)))
    members = [Member(first), Member(second, weight=0.5), Member(conv)]
    stacked = np.concatenate([first, 0.5 * second, conv.reshape(-1, 16)])
    order = rng.permutation(16)
    assert retained(members, order, pattern="2:4") == pytest.approx(retained(stacked, order, pattern="2:4"))
    together = search_order(members, pattern="2:4", moves=50_000)
    alone = search_order(stacked, pattern="2:4", moves=50_000)
    assert retained(stacked, together, pattern="2:4") == pytest.approx(retained(stacked, alone, pattern="2:4"), rel=2e-3)
    ignored = search_order([Member(first), Member(second * 100, weight=0)], pattern="2:4", moves=50_000)
    np.testing.assert_array_equal(ignored, search_order(first, pattern="2:4", moves=50_000))


def test_an_output_member_counts_backward_groups_of_the_forward_masked_weight() -> None:
    weight = torch.randn(8, 3, 12).abs()
    forward = weight.unflatten(-1, (-1, 4))
    masked = torch.where(forward >= forward.topk(2).values[..., -1:], forward, 0.0).flatten(-2)
    order = np.random.default_rng(0).permutation(8)
    groups = masked[order].reshape(2, 4, -1).topk(2, dim=1).values.double().sum()
    assert retained(Member(weight, "output"), order, pattern="2:4") == pytest.approx(float(groups))
    found = search_order(Member(weight, "output"), pattern="2:4", moves=20_000)
    best = max(retained(Member(weight, "output"), o, pattern="2:4") for o in partitions(tuple(range(8)), 4))
    assert retained(Member(weight, "output"), found, pattern="2:4") == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("layout", [
    {"outer": 3}, {"start": 8, "size": 8}, {"start": 4, "size": 8, "outer": 2}, {"size": 6, "inner": 4},
    {"start": 2, "size": 8}, {"start": 3, "size": 5, "outer": 3}, {"size": 8, "inner": 3}, {"inner": 2, "size": 8, "start": 4},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_class_inside_a_larger_axis_never_loses_whatever_the_layout(layout: dict[str, int], kind: str) -> None:
    values = matrix(24, 24)
    member = Member(values, kind, **layout)
    n, outer, inner, start = member.channels, member.outer, member.inner, member.start
    order = np.random.default_rng(0).permutation(n)
    full = np.arange(24)
    for o, c, i in itertools.product(range(outer), range(n), range(inner)):
        full[start + (o * n + c) * inner + i] = start + (o * n + order[c]) * inner + i
    assert retained(member, order, pattern="2:4") == pytest.approx(retained(Member(values, kind), full, pattern="2:4"))
    members = [member, Member(matrix(10, n - n % 4 + 4 * (n % 4 > 0), 5)[:, : n + -n % 4], size=n)]
    found = search_order(members, pattern="2:4", moves=5_000, start=order)
    assert sorted(found) == list(range(n))
    for other in (None, order):
        assert retained(members, found, pattern="2:4") >= retained(members, other, pattern="2:4")


def test_heads_that_share_an_order_are_searched_as_more_rows() -> None:
    values = matrix(10, 48)
    shared = search_order(Member(values, outer=3), pattern="2:4", moves=60_000)
    rows = values.reshape(10, 3, 16).reshape(30, 16)
    np.testing.assert_allclose(
        retained(Member(values, outer=3), shared, pattern="2:4"), retained(rows, shared, pattern="2:4"), rtol=1e-12
    )
    assert retained(rows, shared, pattern="2:4") > retained(rows, pattern="2:4")


def test_blocks_that_hold_whole_groups_are_left_as_they_are() -> None:
    found = search(Member(matrix(10, 48), size=6, inner=8), pattern="2:4")
    assert found.order.tolist() == list(range(6))
    assert found.moves == 0


@pytest.mark.parametrize("shape", [(5, 4), (0, 8), (3, 0), (1, 8)])
def test_trivial_shapes_give_trivial_orders(shape: tuple[int, int]) -> None:
    assert search_order(np.ones(shape), pattern="2:4", moves=100).tolist() == list(range(shape[1]))
    assert search_order(np.zeros(shape), pattern="2:4").tolist() == list(range(shape[1]))


@pytest.mark.parametrize(("importance", "options", "message"), [
    (np.ones((3, 6)), {}, "do not divide into groups of 4"),
    (np.ones((3, 1)), {}, "do not divide into groups of 4"),
    (np.ones(8), {}, "needs a matrix"),
    (np.ones((2, 2, 8)), {}, "needs a matrix"),
    (np.full((2, 8), np.nan), {}, "NaN entries"),
    (np.full((2, 8), np.inf), {}, "infinite entries"),
    (torch.full((2, 8), -1.0), {}, r"negative entries.*weight\.abs\(\)"),
    (np.ones((2, 8), dtype=complex), {}, "needs real numbers"),
    (np.array([["a"] * 8]), {}, "needs real numbers"),
    (np.ones((2, 8)), {"pattern": "4:2"}, "did you mean '2:4'"),
    (np.ones((2, 8)), {"budget_s": -1.0}, "budget_s=-1.0"),
    (np.ones((2, 8)), {"budget_s": float("nan")}, "budget_s=nan"),
    (np.ones((2, 8)), {"moves": -1}, "moves=-1"),
    (np.ones((2, 8)), {"moves": 1.5}, "moves=1.5"),
    (np.ones((2, 8)), {"seed": "x"}, "seed='x'"),
    (np.ones((2, 8)), {"start": np.arange(7)}, "an order of 8 channels"),
    (np.ones((2, 8)), {"start": np.zeros(8, dtype=int)}, "not a permutation"),
    (np.ones((2, 8)), {"start": np.arange(8.0)}, "8 whole numbers"),
    ([Member(np.ones((2, 8))), Member(np.ones((2, 12)))], {}, r"members of one class have \[8, 12\] channels"),
    (Member(np.ones((8, 6)), "output"), {}, "does not divide its last axis"),
])  # fmt: skip
def test_bad_input_is_refused_with_its_shape_and_the_way_out(
    importance: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(NMError, match=message):
        search_order(importance, **{"pattern": "2:4", **options})


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "inputs"}, "choose 'input' or 'output'"),
    ({"weight": -1.0}, "a finite number >= 0"),
    ({"outer": 0}, "outer and inner >= 1"),
    ({"start": 4, "size": 8}, "reaches beyond the axis of 8"),
])  # fmt: skip
def test_a_member_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(NMError, match=message):
        Member(np.ones((2, 8)), **options)


def test_a_matrix_beyond_the_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 10)
    with pytest.raises(NMError, match=r"needs .* GiB, this machine has"):
        search_order(np.ones((8, 8)), pattern="2:4")


def test_ctrl_c_gives_the_best_so_far(engine: str) -> None:
    values = matrix(20, 64)

    def interrupt(progress: Progress) -> None:
        if progress.gained > 0.0:
            raise KeyboardInterrupt

    found = search(values, pattern="2:4", budget_s=60.0, progress=interrupt)
    assert found.seconds < 30
    assert retained(values, found.order, pattern="2:4") > retained(values, pattern="2:4")


def test_the_listener_hears_of_progress_and_can_end_the_search(engine: str) -> None:
    heard: list[Progress] = []
    search_order(matrix(20, 64), pattern="2:4", moves=200_000, progress=heard.append)
    assert len(heard) >= 10
    assert [p.share for p in heard] == sorted(p.share for p in heard)
    assert heard[-1].share == 1.0
    assert [p.gained for p in heard] == sorted(p.gained for p in heard)
    stopped = search(matrix(20, 64), pattern="2:4", moves=10**9, progress=lambda progress: progress.share > 1e-6)
    assert 0 < stopped.moves < 10**8


def test_a_budget_in_seconds_ends_in_time(engine: str) -> None:
    found = search(matrix(64, 128), pattern="2:4", budget_s=0.1)
    assert found.seconds < 5  # a busy machine may be late, not by this much
    assert sorted(found.order) == list(range(128))
    instant = search(matrix(64, 128), pattern="2:4", budget_s=0.0)
    assert instant.moves == 0


def test_searches_in_threads_do_not_disturb_each_other() -> None:
    values = [matrix(16, 64, seed) for seed in range(4)]
    expected = [search_order(each, pattern="2:4", moves=100_000) for each in values]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        found[index] = search_order(values[index], pattern="2:4", moves=100_000)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        np.testing.assert_array_equal(found[index], expected[index])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.booleans(), st.integers(0, 10**6))
def test_the_assignment_is_as_cheap_as_scipys(size: int, tied: bool, seed: int) -> None:
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 3, (size, size)).astype(float) if tied else rng.standard_normal((size, size))
    chosen = assign(cost.copy())
    assert sorted(chosen) == list(range(size))
    rows, columns = linear_sum_assignment(cost)
    assert cost[np.arange(size), chosen].sum() == pytest.approx(cost[rows, columns].sum(), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(patterns, st.sampled_from([1, 7, 600]), st.integers(0, 10**6))
def test_a_slot_filled_anew_keeps_what_the_max_plus_identity_says(text: str, rows: int, seed: int) -> None:
    pattern = Pattern.parse(text)
    n, m = pattern.n, pattern.m
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, 4, (2 * m, rows)).astype(np.float32)
    order, slots = rng.permutation(2 * m), np.empty((m, rows), dtype=np.float32)
    thresholds(columns, order[:m], n, slots)
    sums = np.empty((m, 2 * m), dtype=np.float32)
    max_sums(slots, np.arange(m), columns, order, sums)
    slot, channel = rng.integers(m), m + rng.integers(m)
    swapped = order.copy()
    swapped[slot], swapped[channel] = order[channel], order[slot]
    kept = [retained(columns.T[:, each[:m]], pattern=pattern) for each in (order, swapped)]
    assert kept[1] - kept[0] == pytest.approx(sums[slot, channel] - sums[slot, slot])
    assert kept_sum(columns, order, n, m) == pytest.approx(retained(columns.T, order, pattern=pattern))
