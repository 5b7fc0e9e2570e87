# mypy: disable-error-code="no-any-return,operator,index,no-untyped-call,arg-type"
"""Layers of a captured model that Python calls by themselves: an error where dense weights would train, else a warning."""

import copy
import io
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nm_compiler as nm


class Two(nn.Module):
    """A model in two parts, which training scripts call one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


X = torch.ones(3, 8)


def through_a_file(sparse: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


CALLS: dict[str, Callable[[nn.Module, nn.Module], object]] = {
    "the model itself": lambda model, _: model(X),
    "a part": lambda _, sparse: sparse.body(X),
    "a layer": lambda _, sparse: sparse.body[2](torch.ones(3, 16)),
    "a part of a copy": lambda _, sparse: copy.deepcopy(sparse).body(X),
    "a part that was in a file": lambda _, sparse: through_a_file(sparse).body(X),
    "export": lambda model, _: torch.export.export(model, (X,)),
    "torch.compile": lambda model, _: torch.compile(model, backend="eager")(X),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_beside_the_graph_is_an_error_where_gradients_would_train_dense_weights(
    call: Callable[[nn.Module, nn.Module], object],
) -> None:
    model = Two()
    sparse = nm.compile(model, (X,), method=nm.SRSTE())
    with pytest.raises(nm.NMError, match=r"body\.2 \(Linear\) was called by Python and multiplies its dense weight"):
        call(model, sparse)


def test_without_gradients_it_is_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Two()
    nm.compile(model, (X,), method=nm.SRSTE(), include="*")
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model(X), model(X)
    assert len(caplog.records) == 1
    assert "body.0 (Linear) was called by Python" in caplog.text


def test_the_graph_the_frozen_model_and_weights_that_were_swapped_run_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = Two()
    sparse = nm.compile(model, (X,), method=nm.SRSTE())
    masked = sparse.masked_parameters()
    sparse(X).sum().backward()
    copy.deepcopy(sparse)(X), through_a_file(sparse)(X)
    torch.testing.assert_close(torch.func.functional_call(model, masked, (X,)), sparse(X))
    frozen = nm.freeze(sparse)
    torch.testing.assert_close(frozen.head(frozen.body(X)), frozen(X))
    assert not any(module._forward_pre_hooks for module in frozen.modules())
    assert not caplog.records


def test_weights_in_a_list_are_watched_where_they_are_multiplied() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0] + x @ self.up[1]

    model = nn.Sequential(nn.Linear(8, 8), Experts(), nn.Linear(8, 4))
    sparse = nm.compile(model, (X,), method=nm.SRSTE())
    with pytest.raises(nm.NMError, match=r"1 \(Experts\) was called"):
        sparse[1](X)


def test_a_model_in_fragments_may_call_its_layers_and_nobody_else_may() -> None:
    class Branching(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.head(-y if y.sum() > 0 else y)

    model = Branching()
    sparse = nm.compile(model, (X,), method=nm.SRSTE())
    for inputs in (X, -X, torch.randn(7, 8)):
        sparse(inputs).sum().backward()
    assert model.body[2].weight.grad is not None
    for call in (lambda: sparse.body(X), lambda: model(X), lambda: copy.deepcopy(sparse).body(X)):
        with pytest.raises(nm.NMError, match=r"body\.2 \(Linear\) was called by Python"):
            call()
    frozen = nm.freeze(sparse)
    torch.testing.assert_close(frozen.body(X), frozen.body[2](frozen.body[1](frozen.body[0](X))))


def test_a_watched_layer_that_never_asks_for_its_mode_may_be_in_another() -> None:
    for sparse in (compiled := nm.compile(Two(), (X,), method=nm.SRSTE()), copy.deepcopy(compiled)):
        expected = sparse(X)
        sparse.body[2].eval()  # a linear
        assert torch.equal(sparse(X), expected)
