"""Non-zeros are counted alike by the kernels and by torch, whatever the dtype, the axis and the strides."""

from __future__ import annotations

import pytest
import torch

from nm_compiler.solvers import check


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("m", [4, 16])
def test_the_kernels_count_what_torch_counts(dtype: torch.dtype, axis: int, m: int) -> None:
    weight = torch.randn(32, 48, 64).to(dtype)
    weight[torch.rand(weight.shape) < 0.6] = 0
    weight[weight > 2] = -0.0
    weight[0, 0, 0] = float("nan")
    for each in (weight, weight.transpose(0, 2)):
        if each.shape[axis] % m:
            continue
        groups = (each != 0).movedim(axis, -1).unflatten(-1, (-1, m)).sum(-1)
        assert each.numel() >= check._SMALL
        assert check.worst_group(each, m, axis) == int(groups.max())
        assert check.nonzeros(each) == int((each != 0).sum())


def test_a_weight_without_entries_has_no_non_zeros() -> None:
    assert check.worst_group(torch.empty(0, 4), 4, 1) == check.nonzeros(torch.empty(0, 4)) == 0
