"""Many order searches at once: independent ones, and classes that influence each other."""

from __future__ import annotations

import _thread
import itertools
import threading
import time
from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import nm_compiler as nm
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.coupled import search_coupled
from nm_compiler.solvers.independent import Gate, Problem, search_all, shares
from nm_compiler.solvers.search import Found
from nm_compiler.solvers.search_members import Array, Member, retained


def matrix(rows: int, channels: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_normal((rows, channels)) * rng.lognormal(0, 0.6, channels))


def problem(rows: int, channels: int, seed: int = 0, pattern: str = "2:4") -> Problem:
    values = matrix(rows, channels, seed)
    return Problem(Pattern.parse(pattern), channels, rows, lambda: [Member(values)])


def kept(one: Problem, order: Array | None = None) -> float:
    return retained(list(one.members()), order, pattern=one.pattern)


def test_independent_problems_each_get_an_order_no_worse_than_the_identity_and_a_true_account() -> None:
    problems = [problem(40, 64, 1), problem(30, 16, 2, "1:4"), problem(20, 4, 3), problem(8, 640, 4)]
    found = search_all(problems, numbers=5e7, workers=2)
    for one, each in zip(problems, found, strict=True):
        assert sorted(each.order) == list(range(one.channels))
        total = float(one.members()[0].values.sum())  # type: ignore[union-attr]
        assert kept(one, each.order) >= kept(one)
        assert each.total == pytest.approx(total, rel=1e-5)
        if one.channels > one.pattern.m:
            assert each.share == pytest.approx(kept(one) / total, rel=1e-5)
            assert each.gained == pytest.approx(kept(one, each.order) - kept(one), rel=1e-3)
    assert found[2].gain == 0.0  # one group: nothing to do, at once


def test_the_orders_depend_on_seed_and_numbers_and_not_on_how_many_threads_there_are() -> None:
    problems = [problem(40, 64, seed) for seed in range(5)]
    one, two, other = (
        search_all(problems, numbers=1e8, seed=seed, workers=workers) for seed, workers in ((0, 1), (0, 3), (1, 3))
    )
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left.order, right.order)
    assert any((left.order != right.order).any() for left, right in zip(one, other, strict=True))


def test_time_goes_where_there_is_something_to_gain() -> None:
    flat = Problem(Pattern(2, 4), 64, 40, lambda: [Member(np.ones((40, 64)))])
    rich = problem(40, 64)
    nothing, something = search_all([flat, rich], numbers=5e7, workers=1)
    assert nothing.gain == 0.0
    assert something.moves > 20 * max(1, nothing.moves)


@settings(max_examples=50, deadline=None)
@example([2.0, 5e-324], 2.0, 1.0)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_shares_never_exceed_the_most_nor_the_total_and_leave_nothing_that_could_be_given(
    gains: list[float], total: float, most: float
) -> None:
    given_out = shares(np.array(gains), total, most=most)
    wanting = sum(gain > 0 for gain in gains)
    assert (given_out <= most * (1 + 1e-9)).all()
    assert all(share == 0 for share, gain in zip(given_out, gains, strict=True) if gain == 0)
    assert given_out.sum() == pytest.approx(min(total, wanting * most), rel=1e-6, abs=1e-9)


def test_a_listener_ends_all_searches_and_the_best_so_far_stands() -> None:
    problems = [problem(64, 256, seed) for seed in range(6)]
    stop = threading.Event()
    begin = time.perf_counter()
    found = search_all(problems, budget_s=60.0, workers=2, progress=lambda now: now.gained > 0, stop=stop)
    assert stop.is_set()
    assert time.perf_counter() - begin < 30
    for one, each in zip(problems, found, strict=True):
        assert kept(one, each.order) >= kept(one)


def test_ctrl_c_ends_all_searches_and_the_best_so_far_stands() -> None:
    problems = [problem(64, 256, seed) for seed in range(4)]
    once = threading.Lock()

    def interrupt(now: Any) -> None:
        if now.gained > 0 and once.acquire(blocking=False):
            _thread.interrupt_main()

    found = search_all(problems, budget_s=60.0, workers=2, progress=interrupt)
    assert once.locked()
    assert sum(each.seconds for each in found) < 60
    assert sum(each.gained for each in found) > 0


def test_the_gate_never_lets_in_more_than_fits_and_lets_the_largest_in_alone() -> None:
    gate, inside, most = Gate(10.0), list[float](), list[float]()

    def work(needed: float) -> None:
        with gate.room(needed):
            inside.append(needed)
            most.append(sum(inside))
            time.sleep(0.005)
            inside.remove(needed)

    threads = [threading.Thread(target=work, args=(needed,)) for needed in (4.0, 25.0, 3.0, 6.0, 4.0, 25.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(total <= 10.0 or total == 25.0 for total in most)


class Pair:
    """One weight whose rows are one class and whose columns another, both masks counted: two classes with an edge."""

    def __init__(self, weight: Array, weights: tuple[float, float] = (1.0, 1.0)) -> None:
        self.weight, self.value = weight, weights
        self.graph: nx.Graph[str] = nx.Graph([("rows", "columns")])
        self.orders = {"rows": np.arange(len(weight)), "columns": np.arange(weight.shape[1])}

    def state(self, rows: Array, columns: Array) -> float:
        now = self.weight[rows][:, columns]
        forward = retained([Member(now, weight=self.value[0])], pattern="2:4")
        return forward + retained([Member(now, "output", weight=self.value[1])], pattern="2:4")

    def problems(self, each: str) -> dict[int, Problem]:
        now = self.weight[self.orders["rows"]][:, self.orders["columns"]]
        member = Member(now) if each == "columns" else Member(now, "output")
        return {0: Problem(Pattern(2, 4), member.channels, member.rows, lambda: [member])}

    def move(self, each: str, orders: Mapping[int, Array]) -> float:
        if not orders:
            return 0.0
        trial = {**self.orders, each: self.orders[each][orders[0]]}
        gained = self.state(trial["rows"], trial["columns"]) - self.kept()
        if gained > 0:
            self.orders = trial
        return max(0.0, gained)

    def kept(self) -> float:
        return self.state(self.orders["rows"], self.orders["columns"])


@pytest.mark.ci
def test_classes_that_influence_each_other_never_keep_less_and_reach_the_best_pair_of_orders() -> None:
    for seed in range(4):
        system = Pair(matrix(8, 8, seed))
        before = system.kept()
        found = search_coupled(system, numbers=1e7, workers=1)
        assert set(found) == {("rows", 0), ("columns", 0)}
        assert all(isinstance(each, Found) for each in found.values())
        splits = [[0, *rest] for rest in itertools.combinations(range(1, 8), 3)]
        orders = [np.array([*half, *(c for c in range(8) if c not in half)]) for half in splits]
        best = max(system.state(rows, columns) for rows in orders for columns in orders)
        assert before <= system.kept() <= best * (1 + 1e-9)
        assert system.kept() - before >= 0.7 * (best - before)  # ascent by blocks may stop before the best pair


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 8)).double()


def both_kept(model: nn.Module, backward: float) -> float:
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name not in ("0.weight", "8.weight"):
            values = weight.detach().abs().numpy()
            total += retained([Member(values), Member(values, "output", weight=backward)], pattern="2:4")
    return total


def test_a_permutation_with_backward_masks_keeps_the_function_and_more_of_both_masks_than_one_without() -> None:
    x = torch.randn(4, 32, dtype=torch.float64)
    plain, forward, both = mlp(), mlp(), mlp()
    nm.permute(forward, (x,), budget_s=0.5)
    permutation = nm.permute(both, (x,), budget_s=1.0, backward=1.0)
    torch.testing.assert_close(both(x), plain(x), rtol=1e-11, atol=1e-11)
    assert both_kept(both, 1.0) > both_kept(forward, 1.0) > both_kept(plain, 1.0)
    assert all(gain.after >= gain.before for gain in permutation.gains if gain.name != "0.weight[0]")


def test_the_gain_of_every_class_is_in_the_report_and_in_the_printed_permutation() -> None:
    x = torch.randn(4, 32, dtype=torch.float64)
    sparse = nm.compile(mlp(), (x,), permute="search", budget_s=0.3)
    permutation = nm.permute(mlp(), (x,), budget_s=0.3)
    assert len(permutation.gains) == 3
    assert (
        permutation.gains[0].after - permutation.gains[0].before >= permutation.gains[-1].after - permutation.gains[-1].before
    )
    for gain in permutation.gains:
        (weight,) = gain.weights
        before, after = permutation.retained[weight]
        assert gain.before == pytest.approx(before, rel=1e-4)
        assert gain.after == pytest.approx(after, rel=1e-4)
        assert f"{gain.name}: keeps {gain.before:.4f} -> " in str(nm.report(sparse))
        assert str(gain) in str(permutation)


def test_without_a_budget_the_orders_are_the_same_in_every_run() -> None:
    x = torch.randn(4, 32, dtype=torch.float64)
    one, two = nm.permute(mlp(), (x,)), nm.permute(mlp(), (x,))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_importance_of_ones_own_decides_what_is_kept() -> None:
    x, model = torch.randn(4, 32, dtype=torch.float64), mlp()
    importance = {"2.weight": torch.rand(32, 32) ** 4}
    permutation = nm.permute(model, (x,), budget_s=0.3, importance=importance)
    order = permutation["0.weight[0]"]
    values = importance["2.weight"].numpy()
    assert retained(values, order, pattern="2:4") > 1.02 * retained(values, pattern="2:4")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"backward": -1.0}, "backward=-1.0"), ({"budget_s": -1.0}, "budget_s=-1.0"),
     ({"importance": {"2.weight": torch.ones(3, 3)}}, "2.weight has shape"),
     ({"importance": {"2.weight": torch.full((32, 32), float("nan"))}}, "NaN")],
)  # fmt: skip
def test_bad_options_are_errors_and_leave_the_weights(options: dict[str, Any], said: str) -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(nm.NMError, match=said):
        nm.permute(model, (torch.randn(4, 32, dtype=torch.float64),), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
