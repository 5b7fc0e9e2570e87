# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,misc,no-any-return,no-untyped-call,operator,union-attr"
"""Flex attention in live and captured models: the weights around it are N:M, those inside it have a reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

import nm_compiler as nm
from nm_compiler.unwrapping import unwrap


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


AROUND = ["q.weight", "k.weight", "v.weight", "o.weight"]


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    torch._dynamo.reset()


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses to differentiate flex attention on a CPU; its reference in plain torch ops, which runs here, can."""
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)


class Attention(nn.Module):
    """Two heads over 128 tokens. bias: distances scale each score by a learned table, captured in the score function."""

    def __init__(self, *, masked: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.table = nn.Parameter(torch.randn(2, 128)) if bias else None
        self.mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu") if masked else None

    def score(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        far = (q - k).abs()
        return s - 0.01 * far if self.table is None else s * self.table[h, far]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        heads = [f(x).unflatten(2, (2, 8)).transpose(1, 2).contiguous() for f in (self.q, self.k, self.v)]
        y = flex.flex_attention(*heads, score_mod=self.score, block_mask=self.mask)
        return self.head(self.o(y.transpose(1, 2).flatten(2)))


def sparse_rows(model: nn.Module) -> dict[str, int | None]:
    return {row.name: row.runs for row in nm.report(model).rows if row.status == "sparse"}


def dense_twin(model: nn.Module, **options: Any) -> nn.Module:
    """A plain model that holds what the sparse one multiplies with now."""
    twin, carrier = Attention(**options), unwrap(model)
    own = {name: value for name, value in model.named_parameters() if name in dict(twin.named_parameters())}
    twin.load_state_dict({name: carrier.masked(name)[0] if name in carrier.sites else value for name, value in own.items()})
    return twin


@pytest.mark.ci
@pytest.mark.parametrize("then", ["aot_eager", slow("eager")])
def test_two_steps_through_a_score_function_and_a_block_mask_run_every_weight_sparse(then: str, differentiable: None) -> None:
    model, x = nm.compile(Attention(), method=nm.LBC(), then=then), torch.randn(2, 128, 8)
    optimizer, scheduler = torch.optim.SGD(model.parameters(), lr=0.1), nm.SparsityScheduler(model, total_steps=8)
    for _ in range(2):
        twin = dense_twin(model)
        model(x).square().mean().backward()
        twin(x).square().mean().backward()
        torch.testing.assert_close(model.stem.weight.grad, twin.stem.weight.grad)
        assert all(model.get_parameter(f"{name}_scores").grad.any() for name in AROUND)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert sparse_rows(model) == dict.fromkeys(AROUND, 2)
    assert set(AROUND) <= set(nm.verify(nm.freeze(model, finish=True)).satisfied)


@pytest.mark.ci
@pytest.mark.parametrize("then", [slow("aot_eager"), "eager"])
def test_a_weight_that_the_score_function_captures_stays_dense_with_a_reason_and_trains(
    then: str, differentiable: None
) -> None:
    model, x = nm.compile(Attention(bias=True), method=nm.LBC(), then=then), torch.randn(2, 128, 8)
    assert hasattr(model, "table_scores")
    twin = dense_twin(model, bias=True)
    model(x).square().mean().backward()
    twin(x).square().mean().backward()
    torch.testing.assert_close(model.table.grad, twin.table.grad)
    assert set(sparse_rows(model)) == set(AROUND)
    assert not hasattr(model, "table_scores")
    reason = next(row.reason for row in nm.report(model).rows if row.name == "table")
    assert reason == "read by flex_attention, which has no N:M rule"


@pytest.mark.slow
def test_without_a_block_mask_too_and_on_a_cpu_torch_itself_refuses_the_gradient() -> None:
    model, x = nm.compile(Attention(masked=False), method=nm.Magnitude(), then="aot_eager"), torch.randn(2, 128, 8)
    with torch.no_grad():
        found = model(x)
        torch.testing.assert_close(found, dense_twin(model, masked=False)(x))
    assert set(sparse_rows(model)) == set(AROUND)
    with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
        model(x)


@pytest.mark.slow
def test_inductor_runs_it_without_gradients() -> None:
    model, x = nm.compile(Attention(), method=nm.Magnitude()), torch.randn(2, 128, 8)
    with torch.no_grad():
        found = model(x)
        torch.testing.assert_close(found, dense_twin(model)(x))
    assert sparse_rows(model) == dict.fromkeys(AROUND, 1)


@pytest.mark.slow
def test_a_captured_graph_holds_it_as_well(differentiable: None) -> None:
    x = torch.randn(2, 128, 8)
    model = Attention(bias=True)
    expected = model(x)
    sparse = nm.compile(model, (x,), method=nm.LBC())
    torch.testing.assert_close(sparse(x), expected)
    assert set(sparse_rows(sparse)) == set(AROUND)
