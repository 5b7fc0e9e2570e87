# mypy: disable-error-code="arg-type,no-untyped-call"
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

import nm_compiler as nm
from nm_compiler.errors import NMError
from nm_compiler.methods.transposable import Transposable
from nm_compiler.solvers.transposable import transposable_mask
from nm_compiler.solvers.transposable_kernels import comparators

patterns = st.sampled_from(["1:2", "2:4", "1:4", "3:4", "2:3", "2:5", "4:8", "2:8", "6:8"])


def tile(m: int, seed: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "tied":
        return rng.integers(0, 3, (m, m)).astype(float)
    return np.abs(rng.standard_normal((m, m)) if kind == "gauss" else rng.standard_t(1, (m, m)))


def optimum(weights: np.ndarray, n: int, exactly: bool) -> float:
    """The linear programme, whose corners are whole numbers: the matrix of constraints is totally unimodular."""
    m = len(weights)
    sums = np.concatenate([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    limits = np.full(2 * m, float(n))
    given = {"A_eq": sums, "b_eq": limits} if exactly else {"A_ub": sums, "b_ub": limits}
    return -float(linprog(-weights.reshape(-1), bounds=(0, 1), method="highs", **given).fun)


@settings(deadline=None, max_examples=30)
@given(patterns, st.integers(0, 10**6), st.sampled_from(["gauss", "heavy", "tied"]), st.booleans())
def test_no_mask_of_a_tile_keeps_more(text: str, seed: int, kind: str, exactly: bool) -> None:
    pattern = nm.Pattern.parse(text)
    weights = tile(pattern.m, seed, kind)
    mask = transposable_mask(torch.from_numpy(weights), pattern=text, exactly=exactly).numpy()
    sums = np.concatenate([mask.sum(0), mask.sum(1)])
    assert sums.max() <= pattern.n
    assert not exactly or sums.min() == pattern.n
    assert (weights * mask).sum() == pytest.approx(optimum(weights, pattern.n, exactly), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("text", "exactly"), [("8:16", False), ("8:16", True), ("16:32", False), ("3:16", True)])
def test_large_tiles_are_solved_exactly_too(text: str, exactly: bool) -> None:
    pattern = nm.Pattern.parse(text)
    weights = tile(pattern.m, 3, "gauss")
    mask = transposable_mask(torch.from_numpy(weights), pattern=text, exactly=exactly).numpy()
    assert (weights * mask).sum() == pytest.approx(optimum(weights, pattern.n, exactly), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_2_of_4_agrees_with_an_enumeration_of_all_masks_in_every_tile_of_a_matrix(dtype: torch.dtype) -> None:
    weights = torch.randn(40, 4 * 150, dtype=dtype).abs()
    weights[:8] = weights[:8].round()
    tiles = weights.view(10, 4, 150, 4).transpose(1, 2).reshape(-1, 16).double()
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=16)), dtype=torch.float64)
    square = every.view(-1, 4, 4)
    for exactly in (False, True):
        sums = torch.cat([square.sum(1), square.sum(2)], dim=1)
        allowed = every[(sums == 2).all(1) if exactly else (sums <= 2).all(1)]
        assert not exactly or len(allowed) == 90
        best = torch.stack([(allowed @ one).max() for one in tiles])
        mask = transposable_mask(weights, pattern="2:4", exactly=exactly)
        kept = (mask * weights).view(10, 4, 150, 4).transpose(1, 2).reshape(-1, 16).double().sum(1)
        torch.testing.assert_close(kept, best, rtol=1e-6, atol=1e-6)


def test_tiles_with_an_entry_less_keep_more_where_that_pays() -> None:
    weights = torch.tensor([[0.0, 9, 9, 0], [9, 0, 9, 0], [9, 9, 0, 0], [0, 0, 0, 9]])
    assert float((weights * transposable_mask(weights, pattern="2:4")).sum()) == 63
    assert float((weights * transposable_mask(weights, pattern="2:4", exactly=True)).sum()) == 54


@settings(deadline=None, max_examples=30)
@given(patterns, st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_a_transposed_weight_has_a_mask_as_good_and_scaling_does_not_matter(
    text: str, down: int, right: int, seed: int
) -> None:
    m = nm.Pattern.parse(text).m
    weights = torch.from_numpy(np.abs(np.random.default_rng(seed).standard_normal((2, down * m, right * m))))
    mask = transposable_mask(weights, pattern=text)
    turned = transposable_mask(weights.mT, pattern=text)
    torch.testing.assert_close((weights * mask).sum(), (weights.mT * turned).sum())
    torch.testing.assert_close((weights * mask).sum(), (weights * transposable_mask(4 * weights, pattern=text)).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_batch_and_memory_layout_gives_the_same_mask(dtype: torch.dtype) -> None:
    weights = torch.rand(3, 8, 16).to(dtype)
    mask = transposable_mask(weights, pattern="4:8")
    assert mask.dtype == torch.bool
    apart = torch.stack([weights, weights], -1)[..., 0]
    for same in (apart, weights.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(transposable_mask(same, pattern="4:8"), mask)
    assert torch.equal(torch.stack([transposable_mask(each, pattern=(4, 8)) for each in weights]), mask)


@pytest.mark.parametrize(("importance", "message"), [
    (torch.ones(8), "needs a matrix"),
    (torch.ones(6, 8), "does not divide into tiles of 4 x 4"),
    (torch.ones(8, 6), "does not divide into tiles of 4 x 4"),
    (-torch.ones(4, 4), r"negative entries.*weight\.abs\(\)"),
    (torch.full((4, 4), torch.nan), "NaN or infinite entries"),
    (torch.full((4, 4), torch.inf), "NaN or infinite entries"),
    (torch.ones(4, 4, dtype=torch.complex64), "needs real numbers"),
])  # fmt: skip
def test_bad_importance_is_refused_with_its_shape(importance: torch.Tensor, message: str) -> None:
    with pytest.raises(NMError, match=message):
        transposable_mask(importance, pattern="2:4")


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_empty_and_zero_weights_are_no_trouble(text: str) -> None:
    assert transposable_mask(torch.zeros(0, 8), pattern=text).shape == (0, 8)
    mask = transposable_mask(torch.zeros(8, 8), pattern=text)
    m = nm.Pattern.parse(text).m
    assert int(mask.unflatten(0, (-1, m)).sum(1).max()) <= nm.Pattern.parse(text).n


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 16, 3, groups=2)
        self.odd = nn.Conv2d(16, 6, 1)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.hidden(self.odd(self.conv(self.stem(x)).relu()).mean((2, 3))).relu())
        return out


def test_a_frozen_weight_is_n_m_along_inputs_and_outputs() -> None:
    model = Net()
    sparse = nm.compile(model, (torch.randn(2, 3, 8, 8),), pattern="2:4", method=Transposable())
    sparse(torch.randn(2, 3, 8, 8)).sum().backward()
    conv = model.conv.weight
    assert conv.grad is not None
    nm.freeze(sparse)
    kept = torch.ne(model.conv.weight, 0)
    assert bool((conv.grad[~kept] == 0).all())
    for axis in (0, 1):
        assert int(kept.unflatten(axis, (-1, 4)).sum(axis + 1).max()) <= 2
    assert int(torch.ne(model.odd.weight, 0).unflatten(1, (-1, 4)).sum(2).max()) <= 2


def test_the_report_says_which_weight_is_sparse_forward_only() -> None:
    sparse = nm.compile(Net(), (torch.randn(2, 3, 8, 8),), pattern="2:4", method=Transposable())
    assert "N:M forward only: 6 output channels" in str(nm.report(sparse))


def test_a_checkpoint_with_a_mask_that_is_not_transposable_is_refused() -> None:
    sparse = nm.compile(Net(), (torch.randn(2, 3, 8, 8),), pattern="2:4", method=Transposable())
    state = sparse.state_dict()
    sparse.load_state_dict(state)
    state["conv.weight_mask"] = torch.full_like(state["conv.weight_mask"], 255)
    with pytest.raises(NMError, match="more than 2 of 4"):
        sparse.load_state_dict(state)


@pytest.mark.parametrize("m", [2, 3, 4, 6, 8, 16, 24, 32])
def test_the_comparators_bring_the_largest_to_the_front_in_falling_order(m: int) -> None:
    rng = np.random.default_rng(m)
    for n in {1, m // 2, m - 1}:
        pairs = comparators(n, m)
        for _ in range(30):
            values = rng.permutation(m)
            for a, b in pairs:
                values[a], values[b] = max(values[a], values[b]), min(values[a], values[b])
            np.testing.assert_array_equal(values[: n + 1], np.arange(m)[::-1][: n + 1])
