# mypy: disable-error-code="no-any-return,no-untyped-call,operator,union-attr"
"""Regions without gradients and reentrant checkpoints: their weights are found, and gradients flow where they did."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nm_compiler as nm


class Backbone(nn.Module):
    """A part that records nothing, with one in it that does, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.frozen, self.within = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.layer, self.head = nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        with torch.no_grad():
            z = self.norm(self.frozen(y)) * torch.tensor(2.0)
            with torch.enable_grad():
                w = self.within(y)
            z = z.relu()
        return self.head(self.layer(y) + z + w)


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool = True) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant))


def sparse_of(model: nn.Module, x: Tensor) -> Any:
    return nm.compile(model, (x,), method=nm.SRSTE(decay=0.0))


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 8)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_weights_of_a_region_without_gradients_are_sparse_and_gradients_are_those_of_the_model(x: Tensor) -> None:
    model = Backbone()
    sparse = sparse_of(model, x)
    assert [site.name for site in sparse.plan.sites] == ["frozen.weight", "within.weight", "layer.weight"]
    found = gradients(sparse, x)
    assert torch.is_grad_enabled()
    frozen = nm.freeze(copy.deepcopy(sparse)).train()
    expected = gradients(frozen, x)
    assert [name for name, grad in found.items() if grad is None] == [
        name for name, grad in expected.items() if grad is None
    ] == ["frozen.weight", "frozen.bias", "norm.weight", "norm.bias"]  # fmt: skip
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, msg=name)


class UnderAutocast(Backbone):
    """The same under bfloat16 autocast, which torch.export would carry on without its region."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.ci
def test_a_region_without_gradients_within_autocast_stays_one(x: Tensor) -> None:
    model = UnderAutocast()
    sparse = nm.compile(model, (x,), method=nm.SRSTE())
    sparse(x).float().sum().backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        "stem", "within", "layer", "head",
    }  # fmt: skip
    assert {"frozen.weight", "within.weight", "layer.weight"} == {site.name for site in sparse.plan.sites}


def test_whoever_calls_without_gradients_gets_none_and_has_none_afterwards(x: Tensor) -> None:
    sparse = sparse_of(Backbone(), x)
    with torch.no_grad():
        assert not sparse(x).requires_grad
        assert not torch.is_grad_enabled()
    assert sparse(x).requires_grad


def test_gradients_are_switched_on_again_where_a_region_fails(x: Tensor) -> None:
    sparse = sparse_of(Backbone(), x)
    sparse.norm.running_mean = torch.zeros(3)
    with pytest.raises(RuntimeError):
        sparse(x)
    assert torch.is_grad_enabled()


def test_a_region_survives_saving_and_torch_compile(x: Tensor) -> None:
    sparse = sparse_of(Backbone(), x).eval()
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    wanted = sparse(x)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)
    compiled = torch.compile(sparse, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    assert compiled(x).requires_grad


def test_a_lowered_model_has_its_regions_packed_and_no_switch_left(x: Tensor) -> None:
    model = nm.freeze(sparse_of(Backbone(), x)).eval()
    lowered = nm.lower(model, (x,), backend="dense")
    assert "switch_gradients" not in lowered.run.code
    assert {product.site.name for product in lowered.result.products} == {"frozen.weight", "within.weight", "layer.weight"}
    torch.testing.assert_close(lowered(x[:2]), model(x[:2]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_comes_after_a_checkpoint_of_either_kind_trains(reentrant: bool, x: Tensor) -> None:
    model = Recomputed(reentrant)
    sparse = sparse_of(model, x)
    assert [site.name for site in sparse.plan.sites] == ["block.0.weight"]
    found = gradients(sparse, x)
    expected = gradients(nm.freeze(sparse).train(), x)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)
