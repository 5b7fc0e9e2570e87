"""Models and inputs that were made under `torch.inference_mode`, and calls within it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nm_compiler as nm


def made() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    with torch.no_grad():
        for index in (0, 3, 4):
            model.get_parameter(f"{index}.weight").view(-1, 4)[:, 2:] = 0
    return model


CALLS: dict[str, Callable[[nn.Module, Any], object]] = {
    "nm.compile": lambda model, x: nm.compile(model, (x,)),
    "nm.compile live": lambda model, _: nm.compile(model, then="eager"),
    "nm.permute": lambda model, x: nm.permute(model, (x,)),
    "nm.lower": lambda model, x: nm.lower(model, (x,), backend="dense"),
    "nm.lower_parts": lambda model, x: nm.lower_parts(model, ["0"], lambda model: model(x), backend="dense"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_of_inference_mode_is_an_error_that_says_how_to_copy_it_and_the_copy_works(name: str) -> None:
    with torch.inference_mode():
        model = made()
    x = torch.randn(8, 16)
    with pytest.raises(nm.NMError, match=r"0\W*weight of shape \[16, 16\] was made under torch.inference_mode\(\).*deepcopy"):
        CALLS[name](model, x)
    CALLS[name](copy.deepcopy(model), x)


def test_inputs_of_inference_mode_are_taken_and_so_are_calls_within_it() -> None:
    with torch.inference_mode():
        x = torch.randn(8, 16)
    model = made()
    lowered = nm.lower(model, (x,), backend="dense")
    with torch.inference_mode():
        torch.testing.assert_close(lowered(x), model(x))
        inside = nm.lower(model, (x,), backend="dense")
    torch.testing.assert_close(inside(torch.ones(2, 16)), model(torch.ones(2, 16)))
