# mypy: disable-error-code="arg-type,attr-defined,index,no-untyped-call,operator"
"""Bytes on paper are those that training has, and docs/scaling.md holds what the functions give."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import scale_plan
import torch
from torch import nn

import nm_compiler as nm
from nm_compiler.errors import NMError
from nm_compiler.state.beside import RECIPE

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(), nm.SRSTE(), nm.Magnitude()]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 30), nn.ReLU(), nn.Linear(30, 6))


@pytest.mark.ci(here=["2:4"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:2", "4:8"])
def test_one_rank_has_the_bytes_that_compile_and_adam_make(method: Any, pattern: str) -> None:
    model = network()
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and p.shape[1] % nm.Pattern.parse(pattern).m == 0]
    sparse = nm.compile(copy.deepcopy(model), torch.randn(2, 64), method=method, pattern=pattern, include=names)
    optimizer = torch.optim.Adam(sparse.parameters())
    sparse(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    planned = nm.plan_bytes(model, method=method, pattern=pattern, dtype=torch.float32, include=names)
    before = {name for name, _ in model.named_parameters()}
    tensors = {**dict(sparse.named_parameters()), **dict(sparse.named_buffers())}
    extra = {name: value for name, value in tensors.items() if name not in before and name != RECIPE}
    assert sum(planned.state.values()) == sum(value.nbytes for value in extra.values())
    learned = [value for value in extra.values() if value.grad is not None]
    assert planned.gradients == sum(value.nbytes for value in learned)
    moments = [v for p in learned for v in optimizer.state[p].values() if v.shape == p.shape]
    assert planned.optimizer == sum(value.nbytes for value in moments)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert planned.dense == 4 * dense
    assert planned.weights == sum(model.get_parameter(name).nbytes for name in names)


def test_ranks_hold_equal_parts_of_the_rows_and_the_first_rank_what_is_left_over() -> None:
    shapes = {"a.weight": (10, 64)}
    one, four = (nm.plan_bytes(shapes, method=nm.LBC(), ranks=ranks) for ranks in (1, 4))
    assert one.weights == 10 * 64 * 2
    assert four.weights == 3 * 64 * 2  # 3, 3, 3 and 1 rows
    assert four.state["scores"] == 3 * 64 * 2
    assert four.extra * 10 == one.extra * 3


def test_shapes_and_a_model_on_meta_plan_alike() -> None:
    with torch.device("meta"):
        model = network()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert nm.plan_bytes(model, method=nm.LBC()) == nm.plan_bytes(shapes, method=nm.LBC())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": 0}, "ranks=0"),
        ({"moments": -1}, "moments=-1"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"pattern": "8:16", "method": nm.LBC(scores="combination")}, "more than the 1820"),
        ({"pattern": "1:48"}, "can be 1:48"),
    ],
)
def test_what_cannot_be_planned_is_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(NMError, match=said):
        nm.plan_bytes({"a.weight": (10, 64)}, **options)


def test_the_llama_on_paper_has_70_billion_parameters() -> None:
    shapes = scale_plan.llama_shapes()
    assert 70e9 < sum(math.prod(shape) for shape in shapes.values()) < 71e9
    assert len([name for name in shapes if "proj" in name]) == 80 * 7


@pytest.mark.ci(here=["memory"])
@pytest.mark.parametrize("name", ["training", "parts", "memory", "pruning", "gpus"])
def test_a_table_of_the_page_is_what_the_functions_give(name: str) -> None:
    found = PAGE.split(f"<!-- scale_plan: {name} -->\n")[1].split("\n\n")[0].strip()
    assert found == scale_plan.blocks()[name], "python benchmarks/scale_plan.py prints the tables"


def test_the_speeds_on_the_page_were_measured_on_more_than_a_billion_parameters() -> None:
    folders = json.loads(scale_plan.SPEEDS.read_text())["folders"]
    assert all(found["parameters"] >= 1e9 for found in folders.values())
    assert all(found["peak_bytes"] <= 2 * found["layer_bytes"] for found in folders.values())
