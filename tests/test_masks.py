from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_force_mask

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers import sweeps
from nm_compiler.solvers.combinations import unpack
from nm_compiler.solvers.magnitude import magnitude_mask, value_mask
from nm_compiler.solvers.masks import masked, top_mask

KINDS = [
    *((text, torch.float32) for text in ("1:2", "2:4", "5:7", "1:16", "3:16")),
    *(("2:4", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)), ("3:16", torch.bfloat16),
]  # fmt: skip
FEW = [("5:7", torch.float32), ("2:4", torch.float64), ("2:4", torch.float16), ("2:4", torch.bfloat16), *KINDS[3:5]]
"""By numba, which takes a second to compile a kernel for each pattern and width: every way of doing it, and every width."""


@pytest.fixture(autouse=True, params=["in C", "by numba"], scope="module")
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    found = sweeps.kernels() if request.param == "in C" else None
    if request.param == "in C" and found is None:
        pytest.skip("no CPU kernels here")
    with patch.object(sweeps, "kernels", lambda: found):
        yield


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 17), st.integers(-3, 2), st.integers(0, 10**6), st.booleans(), st.permutations(range(3)))
def test_masks_agree_with_brute_force_in_any_dtype_along_any_axis_of_any_memory_layout(
    kind: int, axis: int, seed: int, tied: bool, memory: list[int]
) -> None:
    kinds = KINDS if sweeps.kernels() else FEW
    text, dtype = kinds[kind % len(kinds)]
    pattern = Pattern.parse(text)
    rng = np.random.default_rng(seed)
    shape = [2, 3, 2]
    shape[axis] = 2 * pattern.m
    values = rng.integers(-2, 3, shape).astype(float) if tied else rng.standard_normal(shape)
    inverse = [memory.index(a) for a in range(3)]
    weight = torch.from_numpy(values).to(dtype).permute(memory).contiguous().permute(inverse)
    expected = brute_force_mask(weight.double().numpy(), pattern.n, pattern.m, axis)
    mask = top_mask(weight, pattern=text, axis=axis)
    np.testing.assert_array_equal(mask.numpy(), expected)
    assert mask.stride() == weight.stride()
    kept = masked(weight, pattern=text, axis=axis)
    assert kept.stride() == weight.stride()
    assert torch.equal(kept, torch.where(torch.from_numpy(expected), weight, torch.zeros((), dtype=dtype)))
    assert torch.equal(top_mask(weight, pattern=text, axis=axis, form="uint8"), mask.to(torch.uint8))
    bits = top_mask(weight, pattern=text, axis=axis, form="bits")
    assert torch.equal(unpack(bits, weight.shape[-1]), mask)


@pytest.mark.parametrize("text", ["2:4", "1:16", "4:16"])
def test_a_large_weight_has_the_mask_that_the_torch_version_gives(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(64, 96, 3, 5)
    for view in (
        weight,
        weight.to(memory_format=torch.channels_last),
        weight[:, ::2],
        weight.flip(0),
        weight.expand(2, -1, -1, -1, -1),
    ):
        axis = view.ndim - 3
        assert torch.equal(top_mask(view, pattern=text, axis=axis), magnitude_mask(view, pattern.n, pattern.m, axis))


def test_nan_and_infinity_are_kept_as_the_largest() -> None:
    weight = torch.tensor([1.0, torch.nan, torch.inf, -5.0, 0.0, -torch.inf, 2.0, 3.0])
    assert top_mask(weight, pattern="2:4").tolist() == [False, True, True, False, False, True, False, True]
    assert top_mask(weight, pattern="1:4").tolist() == [False, True, False, False, False, True, False, False]


def test_zeros_keep_the_first_of_every_group_whatever_their_sign() -> None:
    weight = torch.tensor([0.0, -0.0, 0.0, -0.0] * 4)
    for text in ("2:4", "1:16", "8:16"):
        pattern = Pattern.parse(text)
        first = torch.arange(16) % pattern.m < pattern.n
        assert torch.equal(top_mask(weight, pattern=text), first)


def test_empty_weights_have_empty_masks_and_no_gradient_flows() -> None:
    assert top_mask(torch.zeros(0, 8), pattern="2:4").shape == (0, 8)
    assert masked(torch.zeros(3, 0), pattern="2:4").shape == (3, 0)
    weight = torch.randn(4, 8, requires_grad=True)
    assert not masked(weight, pattern="2:4").requires_grad


@pytest.mark.parametrize(("weight", "options", "message"), [
    (torch.ones(3, 6), {}, r"shape \[3, 6\]: 6 does not divide into groups of 4"),
    (torch.ones(6, 4), {"axis": 0}, "6 does not divide into groups of 4"),
    (torch.ones(4, dtype=torch.int32), {}, "needs float16, bfloat16, float32 or float64"),
    (torch.ones(4, 4), {"axis": 2}, "axis=2 of a weight of shape"),
    (torch.ones(()), {}, "axis=-1 of a weight of shape"),
    (torch.ones(4), {"form": "int"}, "choose 'bool', 'uint8' or 'bits'"),
    (torch.ones(4), {"pattern": "4:4"}, "4:4 is dense"),
])  # fmt: skip
def test_bad_input_is_refused_with_its_shape(weight: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(NMError, match=message):
        top_mask(weight, **{"pattern": "2:4", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("text", ["2:4", "3:16", "6:16"])
def test_a_value_mask_keeps_the_largest_by_sign_the_first_among_equals_and_nan_above_all(
    text: str, dtype: torch.dtype
) -> None:
    pattern = Pattern.parse(text)
    scores = torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (5, 2 * pattern.m, 3)) / 2).to(dtype)
    scores[0, 0], scores[1, 1], scores[2, 2], scores[3, :3] = -0.0, float("inf"), -float("inf"), -float("nan")
    ranked = scores.double().nan_to_num(nan=1e400, posinf=1e300, neginf=-1e300).numpy()
    expected = np.zeros(scores.shape, dtype=bool)
    for row, start, tap in np.ndindex(5, 2, 3):
        group = ranked[row, start * pattern.m : (start + 1) * pattern.m, tap]
        for place in sorted(range(pattern.m), key=lambda j: (-group[j], j))[: pattern.n]:
            expected[row, start * pattern.m + place, tap] = True
    assert np.array_equal(value_mask(scores, pattern.n, pattern.m, 1).numpy(), expected)
