# mypy: disable-error-code="union-attr"
"""A triangle of a weight, what a mask fills with zeros, and rows turned around: steps that keep the zeros of a weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import nm_compiler as nm
from nm_compiler.solvers.magnitude import magnitude_mask

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Step = Callable[[Tensor, Tensor], Tensor]


class Between(nn.Module):
    """Multiplies with what ``step`` makes of a weight and a mask of booleans."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, 16, dtype=torch.float64), nn.Linear(16, 4, dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(16, 16, dtype=torch.float64))
        self.register_buffer("kept", torch.rand(16, 16) < 0.7)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.kept, Tensor)
        result: Tensor = self.head(torch.relu(linear(torch.relu(self.stem(x)), self.step(self.w, self.kept))))
        return result


STEPS: dict[str, Step] = {
    "tril": lambda w, kept: w.tril(),
    "triu": lambda w, kept: w.triu(-2),
    "masked_fill": lambda w, kept: w.masked_fill(~kept, 0.0),
    "where": lambda w, kept: torch.where(kept, w, 0.0),
    "flip": lambda w, kept: w.flip(0),
    "roll": lambda w, kept: w.roll(3, 0),
}


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
@pytest.mark.parametrize("step", STEPS)
def test_a_weight_of_fixed_zeros_or_turned_rows_trains_n_m_as_one_masked_by_hand(step: str, live: bool) -> None:
    model, reference = Between(STEPS[step]), Between(STEPS[step])
    method = nm.SRSTE(decay=0.0)
    sparse = nm.compile(model, method=method, then="eager") if live else nm.compile(model, (X,), method=method)
    with torch.no_grad():
        reference.w.mul_(magnitude_mask(reference.w, 2, 4, 1))
    expected = reference(X)
    expected.square().sum().backward()
    y = sparse(X)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(model.w.grad, reference.w.grad)
    frozen = nm.freeze(sparse)
    assert "w" in nm.verify(frozen, "2:4").satisfied
    torch.testing.assert_close(frozen(X), expected)


@pytest.mark.parametrize("step", ["tril", "where", "roll"])
def test_backward_masks_calibration_and_lowering_go_through_it(step: str) -> None:
    model = Between(STEPS[step])
    squares = nm.calibrate(model, [X]).squares["w"]
    fixed = STEPS[step](torch.ones(16, 16), model.get_buffer("kept"))
    assert torch.equal(STEPS[step](squares, model.get_buffer("kept")) != 0, fixed != 0)
    sparse = nm.compile(model, (X,), method=nm.BiMask())
    sparse(X).square().sum().backward()
    frozen = nm.freeze(sparse).float()
    lowered = nm.lower(frozen, (X.float(),), backend="dense")
    torch.testing.assert_close(lowered(X.float()), frozen(X.float()))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda w, kept: w.masked_fill(kept, 1.0), "read by aten.masked_fill"),
        (lambda w, kept: w.roll(1, 1), "indexed along the axis that its product sums over"),
        (lambda w, kept: w.roll(1), "mixes its axes"),
        (lambda w, kept: w.roll(1, 0) + w.roll(2, 0), "read by aten.add.Tensor"),
        (lambda w, kept: w[torch.arange(15, -1, -1)] + w[torch.arange(16)], "read by aten.add.Tensor"),
    ],
    ids=["ones", "along its groups", "flat", "two rolls", "two choices of rows"],
)
def test_what_moves_zeros_into_other_groups_or_fills_them_is_refused(step: Step, reason: str) -> None:
    with pytest.raises(nm.NMError, match=reason):
        nm.compile(Between(step), (X,))
