"""nm.permute: in place, all or nothing, undone by its inverse, along with the optimizer, and refused with a reason."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet, Remembering, example
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nm_compiler as nm
from nm_compiler.passes import permute as permute_pass


def digest(model: nn.Module, *more: Tensor) -> str:
    tensors = [*model.state_dict().values(), *more]
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def double(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    model = kind().eval()
    x = example(model)
    return model.double(), x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("kind", [MLP, ConvNet, Attention])
def test_a_permuted_model_computes_the_same_and_its_inverse_restores_it_to_the_bit(kind: type[nn.Module]) -> None:
    model, x = double(kind)
    before, weights = model(x), digest(model)
    done = nm.permute(model, (x,), order="random", seed=3)
    assert len(done) >= 2
    assert digest(model) != weights
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    nm.permute(model, (x,), order=done.inverse())
    assert digest(model) == weights


def test_parameters_stay_the_same_objects_and_a_fresh_model_loads_them() -> None:
    model, x = double(ConvNet)
    before, parameters = model(x), list(model.parameters())
    nm.permute(model, (x,), order="random")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    fresh = ConvNet().double().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), before, rtol=0, atol=1e-12)


def test_random_orders_are_those_of_their_seed() -> None:
    orders = []
    for seed in (1, 1, 2):
        model = MLP()
        orders.append(nm.permute(model, (example(model),), order="random", seed=seed).orders)
    assert all(torch.equal(orders[0][name], orders[1][name]) for name in orders[0])
    assert not all(torch.equal(orders[0][name], orders[2][name]) for name in orders[0])


def test_orders_of_ones_own_need_no_weight_that_can_be_sparse() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))  # a stem and a head
    x = torch.randn(4, 6)
    before = model(x)
    permutation = nm.permute(model, (x,), order="random", seed=3)
    assert list(permutation) == ["0.weight[0]"]
    torch.testing.assert_close(model(x), before)
    nm.permute(model, (x,), order={"0.weight[0]": permutation.inverse()["0.weight[0]"]})
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    with pytest.raises(nm.NMError, match="no weight of this Sequential can be 2:4"):
        nm.permute(model, (x,))


def test_an_order_by_the_name_of_an_axis_moves_that_axis_and_what_goes_with_it() -> None:
    model = MLP()
    first, bias, second = (t.detach().clone() for t in (model.fc1.weight, model.fc1.bias, model.fc2.weight))
    rest = model.fc3.weight.detach().clone()
    order = torch.arange(16).flip(0)
    nm.permute(model, (example(model),), order={"fc2.weight[1]": order})  # a member names its class too
    assert torch.equal(model.fc1.weight, first[order])
    assert torch.equal(model.fc1.bias, bias[order])
    assert torch.equal(model.fc2.weight, second[:, order])
    assert torch.equal(model.fc3.weight, rest)


def test_a_write_that_fails_half_way_puts_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = double(ConvNet)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    momenta = [value for state in optimizer.state.values() for value in state.values()]
    before = digest(model, *momenta)
    write, count = permute_pass._write, iter(range(100))

    def failing(*args: Any) -> None:
        if next(count) == 9:
            raise MemoryError("no room for the new order")
        write(*args)

    monkeypatch.setattr(permute_pass, "_write", failing)
    with pytest.raises(MemoryError):
        nm.permute(model, (x,), order="random", optimizer=optimizer)
    assert next(count) > 10, "some were written, and written back"
    assert digest(model, *momenta) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    ],
    ids=["SGD", "AdamW"],
)
def test_training_goes_on_as_if_nothing_had_been_permuted(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model, x = double(MLP)
    target = torch.randn(2, 4, dtype=torch.float64)
    optimizer = make(model.parameters())

    def step(net: nn.Module, rule: torch.optim.Optimizer) -> None:
        rule.zero_grad()
        (net(x) - target).square().sum().backward()
        rule.step()

    for _ in range(3):
        step(model, optimizer)
    twin, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    other = make(twin.parameters())
    other.load_state_dict(state)
    done = nm.permute(model, (x,), order="random", optimizer=optimizer)
    for _ in range(5):
        step(model, optimizer)
        step(twin, other)
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-10)
    nm.permute(model, (x,), order=done.inverse(), optimizer=optimizer)
    for (name, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10, msg=name)
    mine, theirs = (pytree.tree_leaves(rule.state_dict()["state"]) for rule in (optimizer, other))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = MLP()
    with pytest.raises(nm.NMError, match="has none of this model's parameters"):
        nm.permute(model, (example(model),), order="random", optimizer=torch.optim.SGD(MLP().parameters(), lr=1.0))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"fc1.weight[0]": list(range(15))}, ["int64 [15]", "it must be int64 [16]"]),
        ({"fc1.weight[0]": [0] * 16}, ["no permutation of 0 ... 15"]),
        ({"fc1.weight[0]": [*range(15), 16]}, ["no permutation of 0 ... 15"]),
        ({"fc1.weight[0]": [-1, *range(15)]}, ["no permutation of 0 ... 15"]),
        ({"fc1.weight[0]": torch.arange(16.0)}, ["float32 [16]", "it must be int64 [16]"]),
        ({"fc1.weight[0]": [True] * 16}, ["bool"]),
        ({"fc1.weight[0]": "reverse"}, ["no array of numbers"]),
        ({"fc1.wieght[0]": list(range(16))}, ["names no axis", "fc1.weight[0]", "nm.show_axes"]),
        ({"fc1.weight[1]": list(range(8))}, ["pinned", "input x"]),
        ({"fc3.weight[0]": list(range(4))}, ["pinned", "the output"]),
        (
            {"fc1.weight[0]": list(range(16)), "fc2.weight[1]": list(range(16))},
            ["two orders", "fc1.weight[0]", "fc2.weight[1]"],
        ),
        ("sorted", ["order='sorted'", '"search"', '"random"']),
    ],
)
def test_an_order_that_does_not_fit_is_refused_with_a_reason_and_changes_nothing(order: Any, words: list[str]) -> None:
    model = MLP()
    before = digest(model)
    with pytest.raises(nm.NMError) as raised:
        nm.permute(model, (example(model),), order=order)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert digest(model) == before


@dataclass
class Output:
    """What Hugging Face models return, as a dataclass with names."""

    logits: Tensor
    hidden_states: Tensor


class Entries(dict[str, Tensor]):
    """Outputs by name, registered without a function for their keys, as other libraries' are."""


class Fields:
    """Outputs as attributes, registered in the same way."""

    def __init__(self, logits: Tensor, hidden_states: Tensor) -> None:
        self.logits, self.hidden_states = logits, hidden_states


pytree.register_dataclass(Output)
pytree.register_pytree_node(
    Entries, lambda x: ([*x.values()], [*x]), lambda values, keys: Entries(zip(keys, values, strict=True))
)
pytree.register_pytree_node(Fields, lambda x: ([x.logits, x.hidden_states], None), lambda values, _: Fields(*values))


class Two(nn.Module):
    """Logits, and the hidden state that they were made from."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.wrap = nn.Linear(8, 16), nn.Linear(16, 4), wrap

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.up(x))
        return self.wrap(self.down(h), h)


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, h: (y, h),
    "dict": lambda y, h: {"answer": y, "feature": h},
    "dataclass": Output,
    "entries": lambda y, h: Entries(logits=y, hidden_states=h),
    "fields": Fields,
}


@pytest.mark.ci(here=["dict", "fields"])
@pytest.mark.parametrize(
    ("wrap", "outputs", "kept"),
    [
        ("tuple", None, "both"), ("tuple", 0, "logits"), ("tuple", -2, "logits"), ("tuple", 1, "hidden"), ("tuple", [0, 1], "both"),
        ("tuple", lambda out: out[0], "logits"), ("dict", None, "both"), ("dict", "answer", "logits"),
        ("dict", ["answer", "feature"], "both"), ("dict", lambda out: out["answer"], "logits"), ("dataclass", None, "logits"),
        ("entries", None, "logits"), ("entries", "hidden_states", "hidden"), ("fields", None, "logits"), ("fields", 1, "hidden"),
        ("dataclass", "hidden_states", "hidden"), ("dataclass", lambda out: (out.logits, out.hidden_states), "both"),
    ],
)  # fmt: skip
def test_outputs_that_matter_keep_their_order_and_others_need_not(wrap: str, outputs: Any, kept: str) -> None:
    model, x = Two(WRAPS[wrap]).double(), torch.randn(2, 8, dtype=torch.float64)
    before = pytree.tree_leaves(model(x))
    nm.permute(model, (x,), order="random", outputs=outputs, include=["*"], seed=1)
    for name, old, new in zip(("logits", "hidden"), before, pytree.tree_leaves(model(x)), strict=True):
        assert torch.allclose(new, old, rtol=0, atol=1e-12) == (kept in ("both", name)), name
        torch.testing.assert_close(new.sort().values, old.sort().values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ("anser", ["outputs='anser'", "answer, feature"]),
        (2, ["outputs=2", "answer, feature"]),
        (lambda out: out["anser"], ["could not choose", "KeyError"]),
        (lambda out: 3, ["takes the model's outputs and returns some of them"]),
    ],
)
def test_outputs_that_a_model_does_not_have_are_refused(outputs: Any, words: list[str]) -> None:
    model = Two(WRAPS["dict"])
    before = digest(model)
    with pytest.raises(nm.NMError) as raised:
        nm.permute(model, (torch.randn(2, 8),), order="random", outputs=outputs, include=["*"])
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert digest(model) == before


@pytest.mark.parametrize("held", ["buffer", "attribute"])
def test_a_weight_whose_memory_another_tensor_shares_keeps_its_order(held: str) -> None:
    model = MLP()
    if held == "buffer":
        model.register_buffer("view", model.fc1.bias.data[:4], persistent=False)
    else:
        model.view = model.fc1.bias.data[:4]
    axes = nm.show_axes(model, (example(model),))
    assert axes["fc1.weight[0]"].pinned == "fc1.bias shares its memory with view"
    assert axes["fc2.weight[0]"].free


def test_weights_side_by_side_in_one_memory_are_free() -> None:
    model, memory = MLP(), torch.randn(1000)
    for parameter in model.parameters():
        parameter.data, memory = memory[: parameter.numel()].view_as(parameter), memory[parameter.numel() :]
    assert len(nm.show_axes(model, (example(model),)).free) == 2


def test_a_buffer_that_is_written_without_a_result_goes_along() -> None:
    class Averaged(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
            self.register_buffer("mean", torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            if self.training:
                with torch.no_grad():
                    self.mean.lerp_(h.mean(0), 0.1)
            y: Tensor = self.down(h)
            return y

    model, x = Averaged(), torch.randn(4, 8)
    twin = copy.deepcopy(model)
    done = nm.permute(model, (x,), order="random", include=["*"])
    model.train()(x)
    twin.train()(x)
    torch.testing.assert_close(model.mean, twin.mean[done["up.weight[0]"]])


def test_what_a_model_keeps_of_its_weights_in_evaluation_mode_is_made_anew_in_the_new_order() -> None:
    model, x = Remembering().eval(), torch.randn(4, 8)
    with torch.no_grad():
        before, bias = model(x), model.bias.clone()
    nm.permute(model, (x,), order="random")
    assert not torch.equal(model.bias, bias)
    torch.testing.assert_close(model(x), before)
    assert not model.training
