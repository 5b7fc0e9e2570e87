# mypy: disable-error-code="no-any-return,no-untyped-call,operator,union-attr"
"""Quantisers written by hand: rounding with a straight-through gradient between a weight and its product keeps zeros."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import nm_compiler as nm
from nm_compiler.solvers.magnitude import magnitude_mask

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rounded(w: Tensor) -> Tensor:
    return w + (torch.round(w / 0.05) * 0.05 - w).detach()


def learned_step(w: Tensor) -> Tensor:
    scaled = torch.clamp(w / 0.05, -8, 7)
    return ((scaled.round() - scaled).detach() + scaled) * 0.05


def binary(w: Tensor) -> Tensor:
    return w.tanh() + (w.sign() * w.abs().mean() - w.tanh()).detach()


class Quantised(nn.Module):
    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.fc, self.head = (nn.Linear(*each, dtype=torch.float64) for each in ((8, 16), (16, 16), (16, 4)))
        layer = type("Quantise", (nn.Module,), {"forward": lambda self, w: quantise(w)})()
        parametrize.register_parametrization(self.fc, "weight", layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(torch.relu(self.stem(x)))))


NAME = "fc.parametrizations.weight.original"


def made(quantise: Callable[[Tensor], Tensor]) -> Any:
    torch.manual_seed(0)
    return Quantised(quantise)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
@pytest.mark.parametrize("quantise", [rounded, learned_step, binary])
def test_a_weight_behind_a_quantiser_of_ones_own_trains_n_m_as_one_masked_by_hand(
    quantise: Callable[[Tensor], Tensor], live: bool
) -> None:
    model, reference = made(quantise), made(quantise)
    method: Any = nm.SRSTE(decay=0.0)
    sparse = nm.compile(model, method=method, then="eager") if live else nm.compile(model, (X,), method=method)
    weight = reference.get_parameter(NAME)
    with torch.no_grad():
        weight.mul_(magnitude_mask(weight, 2, 4, 1))
    result, expected = sparse(X), reference(X)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=False):
        torch.testing.assert_close(ours.grad, theirs.grad)
    frozen = nm.freeze(sparse).eval()
    torch.testing.assert_close(frozen(X), expected)
    assert nm.verify(frozen, "2:4").satisfied == {NAME: (1,)}


@pytest.mark.parametrize("method", [nm.BiMask(), nm.LBC()], ids=lambda each: each.name)
def test_backward_masks_and_lowering_go_through_it(method: nm.Method) -> None:
    model = made(learned_step)
    sparse = nm.compile(model, (X,), method=method)
    sparse(X).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    frozen = nm.freeze(sparse, finish=True).eval()
    lowered = nm.lower(frozen, (X,), backend="dense")
    torch.testing.assert_close(lowered(X), frozen(X))


def test_calibration_measures_what_the_weight_is_multiplied_with() -> None:
    model = made(rounded)
    hidden = torch.relu(model.stem(X))
    found = nm.calibrate(model, [X])[NAME]
    torch.testing.assert_close(found.expand(16, 16)[0], hidden.square().sum(0).detach())


@pytest.mark.parametrize(
    "move",
    [lambda w: w + 0.1 * w.t(), lambda w: w - w.mean(), lambda w: w.clamp(0.01, 1), lambda w: w + (w + 1).detach()],
    ids=["transposed", "mean", "bounds without zero", "one more"],
)
def test_what_fills_zeros_is_still_refused(move: Callable[[Tensor], Tensor]) -> None:
    sparse = nm.compile(made(move), (X,), include=["stem.weight"])
    reasons = {refusal.where: refusal.reason for refusal in sparse.plan.refusals}
    assert "which has no N:M rule" in reasons[NAME]
