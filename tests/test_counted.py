# mypy: disable-error-code="arg-type,assignment,attr-defined,no-any-return,no-untyped-call,operator,union-attr"
"""Numbers and tensors that forward() keeps from call to call: a captured graph would hold those of its capture."""

import copy
from collections import deque

import pytest
import torch
from models import MLP
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.capture.exported import Exported
from nm_compiler.unwrapping import unwrap

X = torch.randn(6, 8)


class Keeping(MLP):
    """Counts, has a flag, and notes a size. Its weight is 2:4, so that a mask changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.calls, self.ready, self.size, self.mean, self.warmup, self.window = 0, 0, False, 0, 0.5, 2, 12
        self.memory, self.states, self.mask, self.seen = torch.zeros(8), None, None, None
        self.last, self.losses, self.tables, self.pairs = (
            deque[Tensor](maxlen=3),
            list[Tensor](),
            dict[int, Tensor](),
            {"x": X[0]},
        )
        self.shift = nn.Parameter(torch.zeros(8))
        with torch.no_grad():
            self.fc2.weight.unflatten(1, (-1, 4))[..., 2:] = 0


class WarmingUp(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return super().forward(x if self.step > self.warmup else x / 2)


class Growing(Keeping):
    def tick(self) -> None:
        self.step = self.step + 1

    def forward(self, x: Tensor) -> Tensor:
        self.tick()
        return super().forward(x * self.factor())

    def factor(self) -> float:
        return min(1.0, self.step / 5)


class StartingFromData(Keeping):
    """As the actnorm of a normalising flow does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
            self.ready = True
        return super().forward(x + self.shift)


class Alternating(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.ready = not self.ready
        return super().forward(x if self.ready else -x)


class Told(Keeping):
    """What it does to itself lies in a function that is none of its methods."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * counted_up(self))


def counted_up(model: Keeping) -> int:
    model.step += 1
    return model.step


class InADict(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"step": 0, "of": 4.0}

    def forward(self, x: Tensor) -> Tensor:
        self.state["step"] += 1
        return super().forward(x if self.state["step"] > self.warmup else x / 2)


class InAList(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.steps[0] += 1
        return super().forward(x * min(1.0, self.steps[0] / 80))


class FloatInADict(InADict):
    def forward(self, x: Tensor) -> Tensor:
        self.state["of"] *= 0.9
        return Keeping.forward(self, x * self.state["of"])


class Decaying(Keeping):
    """As the membrane of a spiking neuron."""

    def forward(self, x: Tensor) -> Tensor:
        self.memory = 0.9 * self.memory + x.detach().mean(0)
        return super().forward(x + self.memory)


class Recurrent(Keeping):
    """Its states are none at first, and whoever begins a sequence sets them to none again."""

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.states if self.states is not None else (torch.zeros_like(x), torch.zeros_like(x))
        h, c = torch.tanh(x + h), c + x
        self.states = h.detach(), c.detach()
        return super().forward(h + c)


class Rolling(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.losses = [*self.losses, x.detach().mean(0)][-3:]
        return super().forward(x + torch.stack(self.losses).mean(0))


class RollingDeque(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.last.append(x.detach().mean(0))
        return super().forward(x + torch.stack(list(self.last)).mean(0))


class Swapping(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + self.pairs["x"])
        self.pairs["x"] = x.detach().mean(0)
        return y


class Counting(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.step = self.step + len(self.fc1.weight)
        self.mean = 0.9 * self.mean + 0.1
        return super().forward(x)


class Masked(Keeping):
    """A mask and a table that are made once, something to look at afterwards, and a record."""

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != x.shape[1]:
            self.mask = torch.linspace(0, 1, x.shape[1])
        if x.shape[1] not in self.tables:
            self.tables[x.shape[1]] = torch.arange(x.shape[1]) / 8
        self.seen = x * self.mask + self.tables[x.shape[1]]
        self.losses.append(self.seen.detach().mean())
        if self.window > x.shape[1]:
            self.window = x.shape[1]
        self.seen = self.seen * self.window
        return super().forward(self.seen)


class Sized(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.size = x.shape[1]
        return self.scaled(super().forward(x))

    def scaled(self, y: Tensor) -> Tensor:
        return y / self.size


class Averaging(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1
        return super().forward(x) * self.mean


@pytest.mark.parametrize(
    "kind", [WarmingUp, Growing, StartingFromData, Alternating, Told, Decaying, Recurrent, Rolling, Swapping]
)
def test_what_goes_by_the_last_call_does_so_captured(kind: type[Keeping]) -> None:
    torch._dynamo.reset()
    model = kind()
    dense, sparse = copy.deepcopy(model), nm.compile(model, (X,), method=nm.SRSTE())
    assert (model.step, model.ready, model.states, len(model.last)) == (0, False, None, 0)
    for call in range(8):
        if call == 5:
            dense.states = sparse.states = None
        sparse.train(call not in (4, 5))
        torch.testing.assert_close(sparse(X * call), dense.train(sparse.training)(X * call))
    assert (model.step, model.ready) == (dense.step, dense.ready)


@pytest.mark.parametrize("kind", [Counting, Sized, Masked])
def test_what_is_only_counted_or_made_once_or_set_before_it_is_read_leaves_one_graph(kind: type[Keeping]) -> None:
    sparse = nm.compile(kind(), (X,), method=nm.SRSTE())
    assert all(isinstance(route, Exported) for route in sparse.routes.values())
    assert not sparse.origin.losses
    assert not sparse.origin.tables


def test_lowering_what_keeps_a_tensor_is_an_error_with_the_way_out() -> None:
    for kind in (Decaying, Recurrent, RollingDeque, Swapping):
        with pytest.raises(
            nm.NMError, match=r"reads it in its next call: .* in a buffer, or say check=False if every call begins"
        ):
            nm.lower(kind().eval(), (X,))
        assert nm.lower(kind().eval(), (X,), check=False)(X).shape == (6, 4)
    for kind in (WarmingUp, Counting, Sized, Masked):  # numbers in evaluation mode are taken as they are
        nm.lower(kind().eval(), (X,))


def test_a_deque_which_torch_compile_does_not_roll_is_an_error_and_left_empty() -> None:
    model = RollingDeque()
    with pytest.raises(
        nm.NMError, match=r"sets last and reads it in its next call: .* in a list \(self.last = self.last\[-3:\]\)"
    ):
        nm.compile(model, (X,), method=nm.SRSTE())
    assert not model.last


@pytest.mark.parametrize("kind", [WarmingUp, pytest.param(InADict, marks=pytest.mark.ci), InAList])
@pytest.mark.parametrize("form", ["captured", "live"])
def test_a_counter_is_not_compiled_for_each_of_its_values(form: str, kind: type[Keeping]) -> None:
    torch._dynamo.reset()
    model = kind()
    dense = copy.deepcopy(model)
    sparse = nm.compile(model, (X,), method=nm.SRSTE()) if form == "captured" else nm.compile(model, then="eager")
    for _ in range(100):  # the limit is 64
        torch.testing.assert_close(sparse(X), dense(X))
    other = nm.compile(MLP(), then="eager")
    other(X)
    assert not unwrap(other).live.counts, "a layer's number is a constant elsewhere"


def test_a_float_that_is_kept_is_an_error_with_the_way_out() -> None:
    with pytest.raises(
        nm.NMError, match=r"sets mean and reads it in its next call: .* buffer, or say nm.compile\(model\), without"
    ):
        nm.compile(Averaging(), (X,), method=nm.SRSTE())
    torch._dynamo.reset()
    model = Averaging()
    dense, live = copy.deepcopy(model), nm.compile(model, method=nm.SRSTE(), then="eager")
    for _ in range(4):
        torch.testing.assert_close(live(X), dense(X))


def test_a_float_that_is_kept_in_a_dict_is_an_error_with_the_way_out() -> None:
    with pytest.raises(
        nm.NMError, match=r"sets state and reads it in its next call: .* buffer, or say nm.compile\(model\), without"
    ):
        nm.compile(FloatInADict(), (X,), method=nm.SRSTE())
