"""Zeros and ones are searched packed: 64 rows a word, the same sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nm_compiler.solvers import search_kernels as kernels
from nm_compiler.solvers.search import search, search_order
from nm_compiler.solvers.search_matrix import noise_unit, packed_if_binary
from nm_compiler.solvers.search_members import retained


def ones(rows: int, channels: int, seed: int = 0, density: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).random((rows, channels)) < density).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 16)]), st.integers(1, 200), st.integers(0, 10**6))
def test_packed_sums_equal_those_of_the_plain_matrix(pattern: tuple[int, int], rows: int, seed: int) -> None:
    n, m = pattern
    columns = ones(rows, 2 * m, seed).T.copy()
    columns[0, 0] = 1
    packed = packed_if_binary(columns)
    assert packed.dtype == np.uint64
    order = np.random.default_rng(seed).permutation(2 * m)
    assert kernels.kept_sum(packed, order, n, m) == kernels.kept_sum(columns, order, n, m)
    plain_slots, slots = np.empty((m, rows), np.float32), np.empty((m, packed.shape[1]), np.uint64)
    kernels.thresholds(columns, order[:m], n, plain_slots)
    kernels.thresholds(packed, order[:m], n, slots)
    np.testing.assert_array_equal(np.unpackbits(slots.view(np.uint8), axis=1, bitorder="little")[:, :rows], plain_slots)
    plain, sums = np.empty((m, 2 * m), np.float32), np.empty((m, 2 * m), np.float32)
    kernels.max_sums(plain_slots, np.arange(m), columns, order, plain)
    kernels.max_sums(slots, np.arange(m), packed, order, sums)
    np.testing.assert_array_equal(sums, plain)
    assert noise_unit(packed) == pytest.approx(noise_unit(columns), rel=1e-6)


def test_only_two_valued_matrices_with_zero_are_packed_whatever_the_other_value() -> None:
    columns = ones(70, 100)
    np.testing.assert_array_equal(packed_if_binary(columns * np.float32(0.3)), packed_if_binary(columns))
    columns[69, 99] = 0.5
    assert packed_if_binary(columns) is columns


@pytest.mark.parametrize("channels", [64, 640])
def test_counts_are_searched_as_well_as_magnitudes_and_the_gain_is_the_true_one(channels: int) -> None:
    values = ones(48, channels)
    found = search(values, pattern="2:4", moves=1_000_000)
    before, after = retained(values, pattern="2:4"), retained(values, found.order, pattern="2:4")
    assert found.gain == pytest.approx(after / before - 1, abs=1e-9)
    nearly = values + np.random.default_rng(1).random(values.shape).astype(np.float32) * 1e-4  # not packed
    plain = retained(values, search_order(nearly, pattern="2:4", moves=1_000_000), pattern="2:4")
    assert after - before > 0.97 * (plain - before)
