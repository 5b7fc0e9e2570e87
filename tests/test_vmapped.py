# mypy: disable-error-code="arg-type,attr-defined,no-any-return,no-untyped-call,operator,union-attr"
"""torch.vmap in a model: the weights inside it are found, both carriers compute what the model did."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MLP
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.capture.vmapped import _marks, without_vmap

SIZES: dict[str, Any] = {"dynamic_shapes": ({},)} if torch.__version__ < "2.12" else {}
"""vmap of torch 2.11 takes no sizes that differ from call to call: `nm.compile` says so, and here they are fixed."""


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    torch._dynamo.reset()


class Mapped(nn.Module):
    """A stem, what ``inner`` makes of it, a head."""

    def __init__(self, inner: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.middle, self.stem(x)))


class Last(Mapped):
    """One more layer, which is sparse whatever ``inner`` makes of the one in the middle."""

    def __init__(self, inner: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__(inner)
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(self.inner(self.middle, self.stem(x).tanh()))))


def on_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: layer(row).tanh())(x)


def on_tables(layer: nn.Linear, x: Tensor) -> Tensor:
    table = torch.vmap(lambda i: torch.vmap(lambda j: i * 2 + j + torch.tensor([1, 2]).sum())(torch.arange(16)))
    return layer(x) * table(torch.arange(5)).sum(0)


def under_autocast(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.vmap(layer)(x).float()


def twice_under_autocast(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.vmap(layer)(x) + torch.arange(16)
        with torch.autocast("cpu", enabled=False):
            return torch.vmap(lambda row: layer(row) + torch.tensor([1.0]).sum())(y.float())


@pytest.mark.parametrize(
    ("inner", "then"),
    [
        (on_rows, "eager"),
        *(
            pytest.param(inner, then, marks=pytest.mark.slow)
            for inner in (on_tables, under_autocast)
            for then in ("eager", "aot_eager")
        ),
        pytest.param(on_rows, "aot_eager", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(torch.__version__ < "2.12", reason="vmap of torch 2.11 takes no sizes that differ from call to call")
def test_a_live_model_runs_the_weight_inside_sparse_for_any_batch(inner: Callable[..., Tensor], then: str) -> None:
    model = Mapped(inner)
    batches = [torch.randn(size, 8) for size in (4, 6, 6)]
    dense = [model(x) for x in batches]
    model = nm.compile(model, method=nm.LBC(), then=then)
    for x, expected in zip(batches, dense, strict=True):
        torch.testing.assert_close(model(x), expected)
    model(batches[0]).sum().backward()
    assert model.middle.weight_scores.grad.any()
    assert {row.name: row.runs for row in nm.report(model).rows if row.status == "sparse"} == {"middle.weight": 4}
    assert "vmap" not in nm.show(model)


@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask()], ids=["LBC", "BiMask"])
def test_a_captured_model_masks_the_weight_inside(method: nm.Method) -> None:
    model, x = Mapped(on_rows), torch.randn(4, 8)
    sparse = nm.compile(model, (x,), method=method)
    frozen_values = {name: value.detach().clone() for name, value in sparse.masked_parameters().items()}
    expected = torch.func.functional_call(model, frozen_values, (x,))
    torch.testing.assert_close(sparse(x), expected)
    sparse(x).sum().backward()
    assert model.middle.weight.grad.any()
    assert nm.report(sparse).totals["sparse"] == 1
    assert "vmap" not in nm.show(sparse)


def test_a_captured_model_masks_the_weight_inside_also_in_a_region_of_autocast() -> None:
    model, x = Mapped(twice_under_autocast), torch.randn(4, 8)
    sparse = nm.compile(model, (x,), method=nm.SRSTE(), **SIZES)
    values = {name: value.detach().clone() for name, value in sparse.masked_parameters().items()}
    for _ in range(2):
        torch.testing.assert_close(sparse(x), torch.func.functional_call(model, values, (x,)), rtol=0, atol=0)
        sparse.eval()
    sparse.train()(x).sum().backward()
    assert model.middle.weight.grad.any()
    assert nm.report(sparse).totals["sparse"] == 1
    frozen = nm.freeze(sparse).eval()
    torch.testing.assert_close(nm.lower(frozen, (x,), **SIZES)(x), frozen(x))


def with_gradients(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda row: layer(row).tanh().sum()))(x)


def with_jacobians(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(lambda row: layer(row).tanh()))(x).diagonal(dim1=1, dim2=2)


def with_gradients_of_gradients(layer: nn.Linear, x: Tensor) -> Tensor:
    inner = torch.func.grad(lambda row: layer(row).tanh().square().sum())
    return x + torch.vmap(torch.func.grad(lambda row: inner(row).square().sum()))(x)


def gradient_alone(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.func.grad(lambda whole: layer(whole).tanh().sum())(x)


def product_with_jacobian(layer: nn.Linear, x: Tensor) -> Tensor:
    both = torch.func.jvp(lambda whole: layer(whole).tanh(), (x,), (torch.ones_like(x),))
    return both[0] + both[1]


def under_no_grad(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x + torch.func.grad(lambda whole: layer(whole).tanh().sum())(x)


def without_gradients(layer: nn.Linear, x: Tensor) -> Tensor:
    def inner(row: Tensor) -> Tensor:
        with torch.no_grad():
            y = layer(row).tanh()
        return y + row

    return torch.vmap(inner)(x)


@pytest.mark.parametrize("form", ["captured", "live"])
@pytest.mark.parametrize("inner", [
    with_gradients, with_jacobians, with_gradients_of_gradients, without_gradients, gradient_alone, product_with_jacobian,
    under_no_grad,
])  # fmt: skip
def test_gradients_within_it_and_none_within_it_are_those_of_torch(inner: Callable[..., Tensor], form: str) -> None:
    model, x = Last(inner), torch.randn(4, 8)
    with torch.no_grad():
        for layer in (model.middle, model.last):  # 2:4, so that no mask changes anything
            layer.weight.unflatten(1, (-1, 4))[..., 2:] = 0
    dense = copy.deepcopy(model)
    method = nm.SRSTE(decay=0.0)
    how: dict[str, Any] = {"example_inputs": (x,), **SIZES} if form == "captured" else {"then": "eager"}
    sparse = nm.compile(model, method=method, **how)
    torch.testing.assert_close(sparse(x), dense(x))
    sparse(x).sum().backward()
    dense(x).sum().backward()
    for own, expected in zip(model.parameters(), dense.parameters(), strict=True):
        assert (own.grad is None) is (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(own.grad, expected.grad)
    with torch.no_grad():
        torch.testing.assert_close(sparse.eval()(x), dense.eval()(x))


def test_a_gradient_in_no_grad_in_vmap_is_an_error_with_the_way_out() -> None:
    def inner(layer: nn.Linear, x: Tensor) -> Tensor:
        def row(each: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.func.grad(lambda own: layer(own).sum())(each)

        return torch.vmap(row)(x) + x

    with pytest.raises(nm.NMError, match=r"take .detach\(\) of what it returns in the place of no_grad"):
        nm.compile(Last(inner), then="eager")(torch.randn(4, 8))


def test_a_vmap_in_which_an_op_fails_leaves_no_level_behind() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(3, 4)
    enter, leave = _marks()
    graph.call_function(enter[0], (3, "error"))
    inside = graph.call_function(torch._C._functorch._add_batch_dim, (x, 0, 1))
    fails = graph.call_function(torch.ops.aten.view.default, (inside, [5]))
    outside = graph.call_function(torch._C._functorch._remove_batch_dim, (fails, 1, 3, 0))
    graph.call_function(leave[0], ())
    graph.output((outside,))
    with pytest.raises(RuntimeError):
        without_vmap(graph, "val", contextlib.nullcontext())
    assert torch._C._functorch.maybe_current_level() is None


class Tabled(MLP):
    """What is batched depends on no input, and ends before any: a fragment of its own, as flex attention's masks are made."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.vmap(lambda place: place * 2.0)(torch.arange(4))
        torch._dynamo.graph_break()
        return super().forward(x) + table


@pytest.mark.ci
def test_a_fragment_without_inputs_is_batched_in_the_mode_of_its_own_values() -> None:
    model, x = Tabled(), torch.randn(2, 8)
    expected = model(x)
    model = nm.compile(model, method=nm.LBC(), then="eager")
    torch.testing.assert_close(model(x), expected)
    assert [row.name for row in nm.report(model).rows if row.status == "sparse"] == ["fc2.weight"]
