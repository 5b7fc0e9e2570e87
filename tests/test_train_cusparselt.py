# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Bi-Mask with both sparse products on cuSPARSELt, over the stand-in for the library.

What only a GPU can show is in test_gpu.py and benchmarks/gpu.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cusparselt_standin import install
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.errors import NMError
from nm_compiler.runtime.cusparselt import training
from nm_compiler.runtime.cusparselt.eligible import Machine

DTYPES = [torch.float16, torch.bfloat16]
HALVES = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
COLUMNS = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
OPS = torch.ops.nm


class Net(nn.Module):
    """A gated MLP whose hidden values only its own products read, behind a linear that is read by a norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A machine with a GPU and the library, both made up; what the library's product is called with."""
    monkeypatch.setattr(training, "machine_of", lambda device: Machine("cuda", (9, 0), 800))
    return install(monkeypatch)


def packing(**options: Any) -> nm.BiMask:
    return nm.BiMask(products="cusparselt", **{"min_tokens": 1, **options})


def made(model: nn.Module, method: nm.BiMask, x: Tensor, order: bool = True) -> Any:
    """Compiled, every weight sparse, its rows in an order that is not the first one."""
    sparse = nm.compile(copy.deepcopy(model), (x,), method=method, include=["*"]).train()
    for name, buffer in sparse.named_buffers():
        if order and name.endswith("_order"):
            buffer.copy_(torch.randperm(len(buffer), generator=torch.Generator().manual_seed(1)))
    return sparse


def gradients(sparse: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output, the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    sparse.zero_grad()
    y = run(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    named = {"x": x, **dict(sparse.named_parameters())}
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in named.items()}}


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 0.02) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert found[name].stride() == value.stride(), name
        assert float((found[name].float() - value.float()).norm()) <= share * float(value.float().norm()), name


# --- the ops


def operands(tokens: int, dtype: torch.dtype, ordered: bool = True) -> tuple[Any, ...]:
    order = torch.randperm(32) if ordered else None
    forward, turned = OPS.two_masks(torch.randn(32, 48).to(dtype) / 7, order, 2, 4, 0.0)
    return torch.randn(tokens, 48).to(dtype).requires_grad_(), forward.requires_grad_(), turned, order


@COLUMNS
@HALVES
@pytest.mark.parametrize("tokens", [1, 8, 13])
def test_both_products_are_those_of_the_masked_weights(calls: Any, dtype: torch.dtype, columns: bool, tokens: int) -> None:
    for ordered in (True, False):
        x, weight, turned, order = operands(tokens, dtype, ordered)
        bias, g = torch.randn(32).to(dtype).requires_grad_(), torch.randn(tokens, 32).to(dtype)
        backward = turned.t() if order is None else torch.empty_like(turned.t()).index_copy_(0, order, turned.t())
        for given in (x, x.detach().t().contiguous().t().requires_grad_()):
            calls.clear()
            y = OPS.cslt_train_linear(given, weight, turned, order, bias, 1, columns)
            dx, dw, db = torch.autograd.grad(y, (given, weight, bias), g)
            wanted = functional.linear(x, weight, bias), g @ backward, g.t() @ x, g.sum(0)
            for found, right in zip((y, dx, dw, db), wanted, strict=True):
                torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
            assert [call["shape"][0] for call in calls] == [48, 32]
            assert y.stride() == ((1, tokens) if columns else (32, 1))
            assert dx.is_contiguous() is given.is_contiguous()


@pytest.mark.ci
@COLUMNS
@pytest.mark.parametrize("least", [1, 100], ids=["packed", "dense"])
def test_opcheck_passes_packed_and_dense(calls: Any, columns: bool, least: int) -> None:
    for tokens, ordered in ((8, False), (13, True)):
        x, weight, turned, order = operands(tokens, torch.bfloat16, ordered)
        given = x.detach().t().contiguous().t() if ordered else x
        arguments = (given, weight, turned, order, torch.randn(32).bfloat16(), least, columns)
        torch.library.opcheck(torch.ops.nm.cslt_train_linear, arguments)
        torch.library.opcheck(torch.ops.nm.cslt_input_grad, ((given @ weight.t()).detach(), turned, order, least, columns))
    assert bool(calls) is (least == 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(8, 48)}, "float32"),
        ({"least": 9}, "8 tokens"),
        ({"weight": torch.zeros(40, 48)}, "40 output channels"),
    ],
    ids=["dtype", "tokens", "sizes"],
)
def test_a_call_says_why_it_multiplies_densely(calls: Any, change: dict[str, Any], says: str) -> None:
    given = {"x": torch.zeros(8, 48).half(), "weight": torch.zeros(32, 48), "least": 8}
    assert training.why_dense(**given) is None
    assert says in training.why_dense(**{**given, **change})


# --- the method


@pytest.mark.ci
def test_a_step_on_packed_weights_is_the_step_on_masked_ones(calls: Any) -> None:
    model, x = Net().bfloat16(), torch.randn(3, 8, 16).bfloat16()
    for options in ({}, {"fold": True}):
        dense, packed = (made(model, method, x) for method in (nm.BiMask(**options), packing(**options)))
        wanted, found = gradients(dense, dense, x), gradients(packed, packed, x)
        alike(found, wanted)
        assert len(calls) == 8  # four products, four input gradients
        calls.clear()
        batch = torch.randn(5, 8, 16).bfloat16()
        alike(gradients(packed, packed, batch), gradients(dense, dense, batch))
        calls.clear()


def test_hidden_values_and_their_gradients_stay_in_columns_and_everyone_else_gets_rows(calls: Any) -> None:
    model, x = Net().half(), torch.randn(3, 8, 16).half()
    packed = made(model, packing(), x)
    gradients(packed, packed, x)
    forward, backward = calls[:4], calls[4:]
    assert [call["contiguous"] for call in forward] == [
        False,
        False,
        False,
        True,
    ]  # a matrix x^T is contiguous if x is in columns
    assert [call["shape"][0] for call in backward] == [16, 32, 32, 16]
    assert [call["contiguous"] for call in backward[1:3]] == [True, True]


def test_under_autocast_weights_stay_float32_and_products_are_packed(calls: Any) -> None:
    model, x = Net(), torch.randn(3, 8, 16)
    dense, packed = made(model, nm.BiMask(), x), made(model, packing(), x)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = gradients(dense, dense, x), gradients(packed, packed, x)
    alike(found, wanted)
    assert found["up.weight"].dtype == torch.float32
    assert len(calls) == 8


@pytest.mark.ci
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_takes_a_step_whole_at_any_batch(calls: Any, backend: str) -> None:
    model, x = Net().half(), torch.randn(3, 8, 16).half()
    packed = made(model, packing(min_tokens=20), x)
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 2, 5):  # the second has too few tokens
        x = torch.randn(batch, 8, 16).half()
        wanted = gradients(packed, packed, x)
        calls.clear()
        alike(gradients(packed, compiled, x), wanted)
        assert len(calls) == (8 if batch > 2 else 0)


def test_where_nothing_can_be_packed_training_is_that_of_masked_products() -> None:
    states = []
    for method in (nm.BiMask(interval=2, moves=50), packing(interval=2, moves=50)):
        torch.manual_seed(1)
        model, x = Net(), torch.randn(3, 8, 16)
        sparse = nm.compile(model, (x,), method=method, include=["*"])
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9)
        scheduler = nm.SparsityScheduler(sparse, total_steps=5)
        for _ in range(5):
            sparse(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        states.append((sparse, {name: value.clone() for name, value in sparse.state_dict().items()}))
    (dense, wanted), (packed, found) = states
    for name, value in wanted.items():
        if name != "nm_recipe":
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    dense.load_state_dict(found)  # the same state, in both directions
    packed.load_state_dict(wanted)
    for name in ("up.weight", "down.weight"):
        for ours, theirs in zip(packed.masked(name), dense.masked(name), strict=True):
            assert ours.count_nonzero() == theirs.count_nonzero()
    assert [row.backward_kept for row in nm.report(packed).rows if row.backward_kept] != []
    frozen = nm.freeze(packed)
    assert nm.verify(frozen, "2:4").satisfied
    assert type(frozen) is Net


def test_weights_that_the_library_cannot_take_keep_their_masked_products(calls: Any) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint, self.narrow = nn.Parameter(torch.randn(48, 16) / 4), nn.Linear(16, 24)
            self.right, self.conv = nn.Parameter(torch.randn(32, 16) / 4), nn.Conv1d(16, 16, 1)
            self.fit = nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (functional.linear(x, part) for part in self.joint.chunk(3))
            y = self.conv((q * k * v).transpose(1, 2)).transpose(1, 2)
            return self.narrow(functional.linear(self.fit(y), self.right.t()))

    x = torch.randn(2, 8, 16).half()
    packed = made(Odd().half(), packing(), x)
    gradients(packed, packed, x)
    assert len(calls) == 2
    reasons = {row.name: row.reason for row in nm.report(packed).rows}
    assert "slices" in reasons["joint"]
    assert "24 output channels are no multiple of 16: make them 32" in reasons["narrow.weight"]
    assert "transposed" in reasons["right"]
    assert "conv1d is not trained on packed weights" in reasons["conv.weight"]
    assert "masked dense products: the weight is on cpu" in reasons["fit.weight"]


def test_options_that_make_no_sense_are_refused() -> None:
    for options, says in (
        ({"products": "triton"}, "choose 'dense' or 'cusparselt'"),
        ({"min_tokens": 0}, "whole number >= 1"),
    ):
        with pytest.raises(NMError, match=says):
            nm.BiMask(**options)
    with pytest.raises(NMError, match="LBC's forward mask is not N:M before t_f"):
        nm.LBCBiMask(backward=packing())


def test_the_graph_is_as_read(golden: Callable[[str, str], None]) -> None:
    golden("train_cusparselt_net", nm.show(made(Net(), packing(), torch.randn(3, 8, 16)), training=True))
