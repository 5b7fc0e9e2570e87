"""Plain numbers and switches that forward() reads: a captured graph holds them, so what changes later is told."""

import copy
from typing import Any

import pytest
import torch
from models import MLP, dense
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.capture.held import held

X = torch.randn(4, 8)


class Softened(nn.Module):
    """Divides by its temperature, which a method reads that forward calls."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.unread, self.name = 2.0, 3, "softened"

    @property
    def scale(self) -> float:
        return 1 / self.temperature

    @torch.no_grad()
    def scaled(self) -> float:
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.scaled())


class Annealed(MLP):
    """Has a switch and a number of its own, and a layer with one; it counts its calls, and train() sets a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.softened, self.residual, self.calls, self.fast, self.epoch = Softened(), False, 0, False, 0
        self.dropout_rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = nn.functional.dropout(super().forward(x), self.dropout_rate, self.training)
        softened: Tensor = self.softened(y if self.fast or not self.residual else y + 1)
        return softened

    def train(self, mode: bool = True) -> "Annealed":
        self.fast = not mode
        return super().train(mode)


def compiled() -> tuple[nm.SparseModule, Annealed]:
    model = Annealed()
    return nm.compile(model, (X,), method=nm.SRSTE()), model


def test_what_is_held_is_what_forward_reads_and_neither_it_nor_train_sets() -> None:
    assert {each.where for each in held(Annealed())} == {"softened.temperature", "residual", "dropout_rate"}
    assert {each.where for each in held(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)))} > {"0.p", "1.momentum", "1.eps"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("path", "name", "value", "text"), [
    ("softened", "temperature", 0.5, r"softened\.temperature is 0\.5 now, and the captured graph holds 2\.0: set it before"),
    ("", "residual", True, r"residual is True now, and the captured graph holds False: .*nm\.freeze"),
])  # fmt: skip
def test_one_that_is_changed_is_an_error_until_it_is_put_back(
    training: bool, path: str, name: str, value: Any, text: str
) -> None:
    sparse, _ = compiled()
    expected = sparse.train(training)(X)
    layer = sparse.get_submodule(path)
    before = getattr(layer, name)
    setattr(layer, name, value)
    with pytest.raises(nm.NMError, match=text):
        sparse(X)
    setattr(layer, name, before)
    torch.testing.assert_close(sparse(X), expected)


def test_an_attribute_that_is_set_on_what_compile_returned_is_the_models() -> None:
    sparse, model = compiled()
    sparse.residual, sparse.of_the_loop = True, 7
    assert model.residual
    assert not hasattr(model, "of_the_loop")
    frozen = nm.freeze(sparse)
    assert isinstance(frozen, Annealed)
    switched = dense(frozen, X)
    frozen.residual = False
    torch.testing.assert_close(switched, dense(frozen, X) + 1 / frozen.softened.temperature)


def test_numbers_that_no_graph_holds_may_change() -> None:
    sparse, model = compiled()
    model.epoch, model.calls, model.softened.unread, model.softened.name = 3, 100, 4, "other"
    sparse(X).sum().backward()
    model.dropout_rate = 0.5
    sparse.eval()(X)
    with pytest.raises(nm.NMError, match="dropout_rate is 0.5 now"):
        sparse.train()(X)


@pytest.mark.ci
def test_fragments_and_live_models_follow_them() -> None:
    class Branching(Annealed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = Branching()
    live, sparse = (
        nm.compile(copy.deepcopy(model), method=nm.SRSTE(), then="eager"),
        nm.compile(model, (X,), method=nm.SRSTE()),
    )
    for each in (live, sparse):
        before = each(X)
        each.softened.temperature = 1.0
        torch.testing.assert_close(each(X), 2 * before)


class Weighted(MLP):
    """A tensor that is no buffer, one that may come later, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.shift, self.activation = torch.ones(4), None, torch.relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(super().forward(x)) * self.classes
        return y if self.shift is None else y + self.shift


@pytest.mark.parametrize(("name", "value", "text"), [
    ("classes", torch.ones(4), "classes is another tensor now, and the captured graph holds the one of before: set it"),
    ("shift", torch.ones(4), "shift is another object now, and the captured graph holds the one of before: set it"),
    ("activation", torch.tanh, "activation is another object now, and the captured graph holds the one of before: set it"),
])  # fmt: skip
def test_a_tensor_or_a_function_that_is_replaced_is_an_error_until_it_is_put_back(name: str, value: Any, text: str) -> None:
    model = Weighted()
    sparse = nm.compile(model, (X,), method=nm.SRSTE())
    expected, before = sparse(X), getattr(model, name)
    setattr(sparse, name, value)
    with pytest.raises(nm.NMError, match=text):
        sparse(X)
    setattr(sparse, name, before)
    torch.testing.assert_close(sparse(X), expected)
    model.classes.mul_(2)  # in place it is followed
    torch.testing.assert_close(sparse(X), 2 * expected)
    torch.testing.assert_close(copy.deepcopy(sparse)(X), 2 * expected)


class Growing(MLP):
    """Layers that it calls if they are there: of a container, one by name that is None at first, registered or not."""

    last: nn.Module | None

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.blocks, self.asks = nn.ModuleList([nn.Linear(4, 4, bias=False)]), asks
        self.extra: nn.Module | None = None
        self.shift: Tensor | None = None
        self.register_module("last", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and bool(x.sum() > 1e9):  # which captures it in fragments
            return x
        y = super().forward(x)
        for block in self.blocks:
            y = block(y)
        y = y if self.shift is None else y + self.shift
        for layer in (self.extra, self.last):
            y = y if layer is None else layer(y)
        return y


@pytest.mark.parametrize("asks", [False, pytest.param(True, marks=pytest.mark.ci)], ids=["graph", "fragments"])
def test_a_layer_that_forward_would_call_and_is_added_later_is_an_error_and_another_is_not(asks: bool) -> None:
    torch._dynamo.reset()
    model: Any = Growing(asks)
    sparse = nm.compile(model, (X,), method=nm.SRSTE())
    expected = sparse(X)
    model.loss, model.aside = nn.MSELoss(), nn.Linear(4, 4)
    torch.testing.assert_close(sparse(X), expected)
    model.blocks.append(nn.Linear(4, 4))
    with pytest.raises(nm.NMError, match=r"blocks\.1 was added after nm\.compile: the captured graph .*before nm\.compile or"):
        sparse(X)
    del model.blocks[1]
    torch.testing.assert_close(sparse(X), expected)
    for name in ("extra", "last"):
        setattr(model, name, nn.Linear(4, 4))
        with pytest.raises(nm.NMError, match=f"{name} was added after nm.compile"):
            sparse(X)
        setattr(model, name, None)
        torch.testing.assert_close(sparse(X), expected)


def test_a_parameter_that_is_added_or_put_in_the_place_of_another_is_an_error() -> None:
    model: Any = Growing(asks=False)
    sparse = nm.compile(model, (X,), method=nm.LBC())
    expected = sparse(X)
    model.blocks[0].bias = nn.Parameter(torch.ones(4))
    with pytest.raises(nm.NMError, match=r"blocks\.0\.bias was added after nm\.compile"):
        sparse(X)
    model.blocks[0].bias = None
    torch.testing.assert_close(sparse(X), expected)
    model.shift = nn.Parameter(torch.ones(4))
    with pytest.raises(nm.NMError, match="shift is a parameter, a buffer or a layer now, and the captured graph holds None"):
        sparse(X)
    del model.shift
    model.shift = None
    nn.utils.parametrizations.weight_norm(model.fc2)
    with pytest.raises(nm.NMError, match=r"fc2\.parametrizations was added after nm\.compile"):
        sparse(X)
    with pytest.raises(nm.NMError, match=r"fc2\.weight is no parameter of its layer any more, .* or take it off again"):
        nm.report(sparse)
