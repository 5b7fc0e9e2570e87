# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The search weighs importances as bytes while it is noisy: near enough, the same everywhere, and never believed unseen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_cases import swept_by

from nm_compiler.pattern import Pattern
from nm_compiler.solvers import coarse, neighbourhood_kernels
from nm_compiler.solvers.neighbourhood import Neighbourhood
from nm_compiler.solvers.search import search
from nm_compiler.solvers.search_members import efficacy, retained
from nm_compiler.solvers.sweeps import kernels

sizes = st.integers(1, 70)


def magnitudes(channels: int, rows: int, seed: int, spread: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_normal((channels, rows)) * rng.lognormal(0, spread, (channels, 1))).astype(np.float32)


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 3.0]))
def test_bytes_are_half_a_step_off_at_most_and_only_what_is_rare_is_clipped(
    channels: int, rows: int, seed: int, spread: float
) -> None:
    columns = magnitudes(channels, rows, seed, spread)
    rounded, steps = coarse.as_bytes(columns)
    assert rounded.dtype == np.uint8
    assert rounded.shape[1] % 64 == 0
    assert not rounded[:, rows:].any()
    off = np.abs(rounded[:, :rows] / steps - columns) * steps
    assert off[columns * steps <= 255].max(initial=0) <= 0.5 + 1e-3
    assert (columns * steps > 255.5).mean() <= 2e-3 + 1 / columns.size


def test_a_matrix_with_few_values_that_are_not_zero_is_not_clipped_to_nothing() -> None:
    columns = np.zeros((100, 100), dtype=np.float32)
    columns[3, 4] = 2.0
    rounded, steps = coarse.as_bytes(columns)
    assert rounded[3, 4] / steps == pytest.approx(2.0)


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, st.integers(1, 700), st.integers(0, 10**6))
def test_both_ways_to_the_sums_give_numpys(slots: int, channels: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = -(-rows // 64) * 64
    left, right = (rng.integers(0, 256, (size, width), dtype=np.uint8) for size in (slots, channels))
    chosen = rng.integers(0, channels, rng.integers(1, 30))
    expected = np.maximum(left[:, None], right[chosen][None]).sum(-1, dtype=np.int64)
    for weigh in (coarse.weigh, neighbourhood_kernels.weigh):
        found = np.empty((slots, len(chosen)), dtype=np.int64)
        weigh(left, right, chosen, found)
        assert np.array_equal(found, expected)


@pytest.mark.skipif(kernels() is None, reason="no CPU kernels here")
@pytest.mark.parametrize("text", ["2:4", "1:8"])
def test_a_search_takes_the_same_way_without_the_kernels(text: str) -> None:
    importance = magnitudes(320, 90, 0).T
    orders = []
    for library in (kernels(), None):
        with swept_by(library):
            orders.append(search(importance, pattern=text, moves=300_000, seed=3).order)
    assert np.array_equal(*orders)


@pytest.mark.parametrize(("text", "spread"), [("2:4", 0.3), ("2:4", 3.0), ("1:16", 1.0)])
def test_what_a_search_says_it_gained_is_what_the_order_keeps_at_every_step(text: str, spread: float) -> None:
    pattern, columns = Pattern.parse(text), magnitudes(320, 70, 1, spread)
    columns /= columns.mean()
    start = np.arange(len(columns))
    before = retained(columns.T, start, pattern=pattern)
    engine = Neighbourhood(columns, start, pattern, seed=0)
    for step in range(60):
        engine.step(step / 60, 1)
        assert retained(columns.T, engine.best, pattern=pattern) - before == pytest.approx(engine.gained, rel=1e-5, abs=1e-3)
    assert efficacy(columns.T, engine.best, pattern=pattern) > 0.5


def test_outlying_channels_do_not_hide_the_others() -> None:
    columns = magnitudes(320, 100, 2)
    columns[::40] *= 1000
    gain = search(columns.T, pattern="2:4", moves=2_000_000).gained
    without = np.delete(columns, np.s_[::40], axis=0)
    assert gain > 0.5 * search(without.T, pattern="2:4", moves=2_000_000).gained


def test_a_search_of_a_few_rounds_keeps_what_they_gained() -> None:
    columns = magnitudes(1040, 60, 4)
    a_round = 256**2
    few = [search(columns.T, pattern="2:4", moves=rounds * a_round).gain for rounds in (1, 3, 6)]
    assert few == sorted(set(few)), "each lasts longer than the one before"
    pattern, start = Pattern(2, 4), np.arange(len(columns))
    engine = Neighbourhood(columns, start, pattern, seed=0)
    engine.step(0.5, 1)
    best, gained = engine.result()
    assert retained(columns.T, best, pattern=pattern) - retained(columns.T, start, pattern=pattern) == pytest.approx(
        gained, rel=1e-4
    )
    assert gained > 0
