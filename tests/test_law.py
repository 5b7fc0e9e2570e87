"""The law behind every permutation: it holds on small nets, and it notices a rule that is wrong."""

from __future__ import annotations

import pytest
import torch
from models import MLP, Attention, ConvNet
from torch import Tensor, nn

from nm_compiler import NMError
from nm_compiler.axes import analyse as walk
from nm_compiler.axes.analysis import Analysis, Call, Value
from nm_compiler.axes.rules import RULES
from nm_compiler.law import permutation_law


def test_the_law_holds_on_small_nets() -> None:
    for model, x in (
        (MLP(), torch.randn(5, 8)),
        (ConvNet(), torch.randn(2, 3, 8, 8)),
        (Attention(), torch.arange(12).view(2, 6)),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        law = permutation_law(model, (x,), undo=10)
        assert law.holds, str(law)
        assert law.dtype == torch.float64
        assert law.error < 1e-12
        assert law.undone >= 6
        assert len(law.axes.free) >= 2
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it works on a copy"


class Normed(nn.Module):
    """A layer norm with a weight of its own between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(self.up(x)))
        return y


def test_a_rule_that_takes_layer_norm_for_unrelated_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unrelated(a: Analysis, call: Call) -> Value:
        return a.dims(call.node.args[0])

    assert permutation_law(Normed(), (torch.randn(4, 6),)).holds
    monkeypatch.setattr(walk, "RULES", {**RULES, "layer_norm": unrelated})
    law = permutation_law(Normed(), (torch.randn(4, 6),))
    assert not law.holds
    assert law.error > 1e-3


def test_a_rule_that_frees_the_entries_of_a_running_sum_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Summed(Normed):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x).cumsum(-1))
            return y

    assert permutation_law(Summed(), (torch.randn(4, 6),)).holds
    monkeypatch.setattr(walk, "RULES", {**RULES, "cumsum": RULES["pointwise"]})
    assert not permutation_law(Summed(), (torch.randn(4, 6),)).holds


def test_an_axis_freed_without_a_trace_in_the_output_is_undetected() -> None:
    class Unread(Normed):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(x).sum(-1)
            return y

    law = permutation_law(Unread(), (torch.randn(4, 6),))
    assert law.error < 1e-12
    assert not law.holds, "any order of the summed channels will do: nothing proves that an order was right"
    assert "up.weight[0]" in law.undetected


def test_a_model_whose_outputs_change_from_run_to_run_is_refused() -> None:
    class Noisy(Normed):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y + torch.rand_like(y)

    with pytest.raises(NMError, match="change from run to run"):
        permutation_law(Noisy(), (torch.randn(4, 6),))
