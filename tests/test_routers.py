"""The gate of a mixture stays dense where its result chooses, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nm_compiler as nm


class Mixture(nn.Module):
    """Four experts between a stem and a head; ``how`` a token finds its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.gate, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.bias, self.experts = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.randn(4, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        shares = torch.softmax(self.gate(x), -1)
        if self.how == "topk":  # on scores with a bias of their own, whose values are not used
            best = (torch.sigmoid(self.gate(x)) + self.bias).topk(2, -1).indices
            parts = [torch.einsum("bi,boi->bo", x, self.experts[best[:, k]]) for k in (0, 1)]
            y = (torch.stack(parts, 1) * shares.gather(1, best)[..., None]).sum(1)
        elif self.how == "argmax":
            y = torch.einsum("bi,boi->bo", x, self.experts[shares.argmax(-1)])
        elif self.how == "max":
            largest, index = shares.max(-1)
            y = torch.einsum("bi,boi->bo", x, self.experts[index]) * largest[:, None]
        elif self.how == "masked":  # all experts run, one counts
            taken = nn.functional.one_hot(shares.argmax(-1), 4).to(x.dtype)
            y = (torch.einsum("bi,eoi->beo", x, self.experts) * taken[..., None]).sum(1)
        else:  # all experts count
            y = (torch.einsum("bi,eoi->beo", x, self.experts) * shares[..., None]).sum(1)
        z: Tensor = self.head(x + y)
        return z


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    sparse = nm.compile(model, (torch.randn(3, 8),), method=nm.SRSTE(), **options)
    return {row.name: row.reason for row in nm.report(sparse).rows if row.status == "dense"}


@pytest.mark.ci(here=["topk", "soft"])
@pytest.mark.parametrize("how", ["topk", "argmax", "max", "masked", "soft"])
def test_a_gate_whose_result_chooses_experts_is_a_router(how: str) -> None:
    found = reasons(Mixture(how))
    if how == "soft":
        assert "gate.weight" not in found
    else:
        assert found["gate.weight"] == "router: its result chooses what weights come next (include= makes it sparse)"
    assert found.keys() - {"gate.weight"} == {"stem.weight", "head.weight"}


@pytest.mark.ci
def test_include_takes_a_router_in_and_a_live_model_has_it_dense_as_well() -> None:
    assert "gate.weight" not in reasons(Mixture("topk"), include="gate.*")
    model = nm.compile(Mixture("topk"), method=nm.LBC(), then="eager")
    model(torch.randn(3, 8))
    assert "router:" in str(nm.report(model))
    assert not hasattr(model.gate, "weight_scores")


class Largest(nn.Module):
    """A wide layer of which the largest entries go on: no gate, although it takes the same ops."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.up(torch.relu(self.stem(x))))
        values, index = wide.topk(4, -1)
        y: Tensor = self.head(self.down(torch.zeros_like(wide).scatter(-1, index, values)))
        return y


class Labelled(nn.Module):
    """Its last product is compared, and nothing comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.middle(torch.relu(self.stem(x))))
        return self.one(x).argmax(-1), self.two(x)


def test_the_largest_of_a_wide_layer_and_the_label_of_a_head_are_no_routers() -> None:
    assert set(reasons(Largest())) == {"stem.weight", "head.weight"}
    assert not any("router" in reason for reason in reasons(Labelled()).values())
