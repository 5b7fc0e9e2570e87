"""The search of a backward order by exchanges, which a GPU gets, on a CPU."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ConvNet, example
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nm_compiler as nm
from nm_compiler.methods import bimask
from nm_compiler.solvers import backward_order, device_order, order_launch
from nm_compiler.solvers.backward_order import (
    assignment_search,
    exchange_search,
    kept_importance,
    quick_search,
    search_all,
)
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.order_launch import Problem

patterns = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 16), (2, 3)])


def kept(importance: Tensor, order: Tensor, n: int, m: int) -> float:
    return float(kept_importance(importance, order, n, m))


def masked(rows: int, columns: int, n: int, m: int, seed: int, *, heavy: bool = False) -> Tensor:
    """What a forward mask leaves of random weights; heavy: rows and columns of very different size."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    if heavy:
        for shape in ((rows, columns), (rows, 1), (1, columns)):
            weight = weight * torch.exp(0.7 * torch.randn(shape, generator=draw))
    return weight.abs() * magnitude_mask(weight, n, m, 1)


@settings(deadline=None, max_examples=40)
@given(patterns, st.integers(1, 9), st.booleans(), st.integers(0, 10**6))
def test_an_order_by_exchanges_is_a_permutation_never_worse_than_identity_or_start(
    nm: tuple[int, int], groups: int, ties: bool, seed: int
) -> None:
    n, m = nm
    draw = torch.Generator().manual_seed(seed)
    importance = torch.rand(groups * m, 9, generator=draw)
    importance = (importance * 3).round() if ties else importance
    start = torch.randperm(groups * m, generator=draw)
    found = exchange_search(importance, start, n, m, moves=200, seed=seed)
    assert found.dtype == torch.int64
    assert torch.equal(found.sort().values, torch.arange(groups * m))
    for other in (start, torch.arange(groups * m)):
        assert kept(importance, found, n, m) >= kept(importance, other, n, m)
    assert torch.equal(found, exchange_search(importance, start, n, m, moves=200, seed=seed))


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 12), st.sampled_from(["plain", "ties", "rounding"]), st.integers(0, 10**6))
def test_slots_are_dealt_out_as_a_permutation_whose_worth_does_not_fall(count: int, kind: str, seed: int) -> None:
    worth = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    worth = (worth * 4).round() if kind == "ties" else worth
    worth = (1 + 2e-6 * worth).float() if kind == "rounding" else worth  # gains about as large as may be none
    dealt = device_order._dealt(worth)
    assert torch.equal(dealt.sort().values, torch.arange(count))
    assert float(worth.double().gather(1, dealt.unsqueeze(1)).sum()) >= float(worth.double().trace()) - 1e-12


def test_a_swap_and_a_ring_of_three_are_found() -> None:
    for ring in ([1, 0, 2, 3], [1, 2, 0, 3], [2, 0, 1, 3], [0, 3, 2, 1]):
        worth = torch.zeros(4, 4)
        worth[torch.arange(4), torch.tensor(ring)] = 1
        assert device_order._dealt(worth).tolist() == ring


@settings(deadline=None, max_examples=30)
@given(patterns, st.booleans(), st.integers(0, 10**6))
def test_distances_from_thresholds_tell_what_an_exchange_gains(nm: tuple[int, int], ties: bool, seed: int) -> None:
    n, m = nm
    draw = torch.Generator().manual_seed(seed)
    importance = torch.rand(2 * m, 5, generator=draw, dtype=torch.float64)
    importance = (importance * 3).round() if ties else importance
    inside = torch.randperm(2 * m, generator=draw).view(2, m)
    slots = torch.randint(m, (2, 1), generator=draw)
    own = importance[inside.gather(1, slots)[:, 0]]
    thresholds = device_order._thresholds(importance, inside, own, n)
    others = importance[inside].scatter(1, slots.unsqueeze(-1).expand(2, 1, 5), -1)
    assert torch.equal(thresholds, others.topk(n, dim=1).values[:, -1])
    worth = torch.cdist(thresholds, own, p=1.0)
    exchanged = inside.scatter(1, slots, inside.gather(1, slots).flip(0))
    gained = kept(importance, exchanged.flatten(), n, m) - kept(importance, inside.flatten(), n, m)
    told = float(worth[0, 1] + worth[1, 0] - worth.trace()) / 2
    assert told == pytest.approx(gained, abs=1e-9)


def test_sorting_a_few_groups_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    importance = masked(96, 32, 2, 4, 0)
    whole = exchange_search(importance, torch.arange(96), 2, 4, moves=500, seed=3)
    monkeypatch.setattr(device_order, "_NUMBERS", 1000)
    assert torch.equal(exchange_search(importance, torch.arange(96), 2, 4, moves=500, seed=3), whole)


def test_more_groups_than_a_round_takes_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_order, "AT_ONCE", 8)
    importance = masked(128, 32, 2, 4, 0)
    found = exchange_search(importance, torch.arange(128), 2, 4, moves=2000, seed=0)
    assert torch.equal(found.sort().values, torch.arange(128))
    assert int((found != torch.arange(128)).sum()) > 64
    assert kept(importance, found, 2, 4) > 1.02 * kept(importance, torch.arange(128), 2, 4)


@pytest.mark.parametrize("groups", [2, 7, 128, 131, 300])
def test_a_round_draws_a_place_in_each_of_its_groups_and_groups_take_turns(groups: int) -> None:
    places = device_order.drawn(groups, 4, 20_000, 3)
    count = min(128, groups)
    assert places.shape == (-(-20_000 // count), count)
    assert all(len(each.unique()) == count for each in places // 4)
    assert len((places[: groups // count] // 4).unique()) == groups // count * count
    assert len(places.unique()) == 4 * groups


def test_searching_all_is_searching_one_after_the_other() -> None:
    problems = [
        Problem(masked(rows, 24, n, m, seed), torch.arange(rows), n, m, seed)
        for seed, (rows, n, m) in enumerate([(32, 2, 4), (64, 1, 4)])
    ]
    for search in (quick_search, exchange_search, assignment_search):
        found = search_all(search, problems, moves=300)
        for each, order in zip(problems, found, strict=True):
            assert torch.equal(order, search(each.importance, each.order, each.n, each.m, moves=300, seed=each.seed))
        assert search_all(search, [], moves=300) == []


@pytest.mark.ci(here=["[0]"])
@pytest.mark.parametrize("limit", [0, 1500, 10**9])
def test_how_many_weights_are_searched_at_once_changes_no_order(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, orders = ConvNet(16), []
    for at_once in (0, limit):
        monkeypatch.setattr(bimask, "together", lambda *_, at_once=at_once: at_once)
        sparse = nm.compile(copy.deepcopy(model), example(model), method=nm.BiMask(moves=200))
        kept_at = {weight.site.name: weight["order"].data_ptr() for weight in sparse.weights if weight.site.backward_groups}
        nm.SparsityScheduler(sparse, total_steps=1).step()
        for weight in sparse.weights:
            if weight.site.backward_groups:
                assert weight["order"].data_ptr() == kept_at[weight.site.name], "graphs of the step read it where it was"
                orders.append(weight["order"].clone())
    half = len(orders) // 2
    assert half > 1
    assert all(torch.equal(one, other) for one, other in zip(orders[:half], orders[half:], strict=True))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_what_cannot_be_searched_keeps_one_of_its_starts(value: float) -> None:
    importance, order = torch.rand(16, 4), torch.randperm(16)
    importance = torch.zeros(16, 4) if value == 0 else importance.index_fill(0, torch.tensor([3]), value)
    found = exchange_search(importance, order, 2, 4, moves=100, seed=0)
    assert torch.equal(found, order) or torch.equal(found, torch.arange(16))
    assert torch.equal(found, assignment_search(importance, order, 2, 4, moves=100, seed=0))


def test_one_group_no_moves_and_no_columns_leave_the_order() -> None:
    for rows, columns, moves in ((4, 8, 100), (16, 8, 0), (16, 0, 100)):
        order = torch.arange(rows)
        assert torch.equal(exchange_search(torch.rand(rows, columns), order, 2, 4, moves=moves, seed=0), order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_importance_of_any_dtype_is_searched(dtype: torch.dtype) -> None:
    importance = masked(64, 32, 2, 4, 0).to(dtype)
    found = exchange_search(importance, torch.arange(64), 2, 4, moves=500, seed=2**64 + 5)
    assert kept(importance.double(), found, 2, 4) > kept(importance.double(), torch.arange(64), 2, 4)


def test_exchanges_find_the_best_order_of_a_tiny_matrix() -> None:
    importance = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = max(kept(importance, torch.tensor(order), 1, 2) for order in itertools.permutations(range(6)))
    found = exchange_search(importance, torch.arange(6), 1, 2, moves=200, seed=0)
    assert kept(importance, found, 1, 2) == pytest.approx(best)


@pytest.mark.ci(here=["2-4-normal"])
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 16)])
def test_exchanges_reach_what_assignments_reach_with_the_same_moves(n: int, m: int, heavy: bool) -> None:
    importance, order = masked(128, 128, n, m, 7, heavy=heavy), torch.arange(128)
    before, reached = kept(importance, order, n, m), []
    for search in (exchange_search, assignment_search):
        ends = [kept(importance, search(importance, order, n, m, moves=3000, seed=seed), n, m) for seed in range(3)]
        reached.append(sum(ends) / len(ends) - before)
    assert reached[0] >= 0.93 * reached[1]


class Asked(TorchDispatchMode):
    """Counts how often the host asks for a number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_asks_the_device_only_every_few_rounds() -> None:
    importance, order = torch.rand(64, 16), torch.arange(64)
    with Asked() as asked:
        device_order.exchanged(importance, order, 2, 4, moves=16 * 40, seed=0)
    assert 1 <= asked.count <= 3


def test_importance_on_a_gpu_is_searched_there_and_all_other_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    importance, order = torch.rand(32, 16), torch.arange(32)
    here = assignment_search(importance, order, 2, 4, moves=100, seed=0)
    assert torch.equal(quick_search(importance, order, 2, 4, moves=100, seed=0), here)
    monkeypatch.setattr(backward_order, "exchange_search", lambda *_args, **_options: order.flip(0))
    there: Any = SimpleNamespace(is_cuda=True)
    assert torch.equal(quick_search(there, order, 2, 4, moves=100, seed=0), order.flip(0))


def test_an_order_that_kernels_got_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(torch.rand(8, 6), torch.tensor([1, 0, 2, 3, 4, 5, 6, 7]), 2, 4, 0)
    monkeypatch.setattr(order_launch, "_better", lambda problem, first, second: second)  # whatever comes is better
    monkeypatch.setattr(order_launch, "_on", lambda problems: nullcontext())
    swapped = torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    for wrong in (
        torch.zeros(8, dtype=torch.int64),
        torch.tensor([0, 1, 2, 3, 4, 5, 6, 99]),
        torch.tensor([-1, 0, 1, 2, 3, 4, 5, 6]),
    ):
        for end, taken in ((wrong, torch.arange(8)), (swapped, swapped)):
            monkeypatch.setattr(order_launch, "_exchanged", lambda *_, end=end, **__: [end])
            (found,) = order_launch.searched([problem], moves=10)
            assert torch.equal(found, taken)
