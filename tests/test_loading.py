# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Checkpoints: state_dicts that fit load and resume to the bit, others are refused and change nothing."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, example, steps
from precompiled import precompiled
from torch import nn

import nm_compiler as nm

METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(interval=2, moves=40), nm.SRSTE(), nm.Magnitude()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m).split(", decay")[0])


def compiled(kind: type[nn.Module], method: Any = None, **options: Any) -> tuple[nm.SparseModule, Any]:
    model = kind(**options)
    return nm.compile(model, example(model), method=method or nm.LBC()), model


def copied(kind: type[nn.Module], method: Any, **options: Any) -> tuple[nm.SparseModule, Any]:
    return precompiled(kind(**options), method, **options)


@pytest.mark.ci(here=["LBC(scores='position'", "BiMask"])
@each_method
def test_a_dense_state_dict_of_a_model_with_two_names_for_one_layer_loads_strictly(method: Any) -> None:
    class Alias(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.fc2

    sparse, model = compiled(Alias, method)
    other = Alias()
    sparse.load_state_dict(other.state_dict(), strict=True)
    assert model.alias is model.fc2
    assert torch.equal(model.fc2.weight, other.fc2.weight)
    names = [name for name in sparse.state_dict() if name.startswith("fc2.")]
    assert {f"alias.{name.removeprefix('fc2.')}" for name in names} <= set(sparse.state_dict())
    sparse.load_state_dict(sparse.state_dict(), strict=True)


def test_loading_one_key_leaves_the_learned_masks_of_the_others_alone() -> None:
    sparse, model = compiled(MLP)
    steps(sparse, 4, example(model), nm.SparsityScheduler(sparse, total_steps=4))
    live = model.fc2.weight_live.clone()
    sparse.load_state_dict({"fc3.bias": torch.zeros(4)}, strict=False)
    assert torch.equal(model.fc2.weight_live, live)
    sparse.load_state_dict(MLP().state_dict())
    assert not torch.equal(model.fc2.weight_live, live)
    assert model.fc2.weight_scores.requires_grad


def test_a_state_dict_of_another_architecture_changes_nothing() -> None:
    sparse, _ = compiled(MLP)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    other = {name: value + 1 for name, value in MLP().state_dict().items()} | {"fc3.weight": torch.zeros(5, 16)}
    with pytest.raises(nm.NMError, match=r"fc3.weight has shape \[5, 16\] in this state_dict and \[4, 16\] in the model"):
        sparse.load_state_dict(other)
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())


def test_the_models_own_extra_state_and_load_hooks_keep_working() -> None:
    class Versioned(MLP):
        version = 1

        def __init__(self) -> None:
            super().__init__()
            self.register_load_state_dict_pre_hook(self._migrate)

        @staticmethod
        def _migrate(module: Any, state_dict: Any, prefix: str, *rest: Any) -> None:
            for name in [name for name in state_dict if name.startswith(prefix + "old_")]:
                state_dict[name.replace("old_", "")] = state_dict.pop(name)

        def get_extra_state(self) -> Any:
            return {"version": self.version}

        def set_extra_state(self, state: Any) -> None:
            self.version = state["version"]

    sparse, model = compiled(Versioned, nm.SRSTE())
    assert sparse.state_dict()["_extra_state"] == {"version": 1}
    state = dict(Versioned().state_dict()) | {"_extra_state": {"version": 7}}
    state["old_fc1.bias"] = state.pop("fc1.bias")
    sparse.load_state_dict(state, strict=True)
    assert model.version == 7


@pytest.mark.ci(here=["LBC(scores='position'"])
@each_method
def test_a_state_dict_round_trip_gives_the_same_function(method: Any) -> None:
    sparse, model = compiled(ConvNet, method)
    x = example(model, batch=3)
    steps(sparse, 6, x, nm.SparsityScheduler(sparse, total_steps=10))
    other, _ = compiled(ConvNet, method)
    other.load_state_dict(sparse.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), sparse.eval()(x))
    assert all(torch.equal(value, sparse.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.ci(here=["LBC(scores='position'"])
@each_method
def test_a_dense_state_dict_loads_strictly_and_resets_the_state(method: Any) -> None:
    sparse, model = compiled(ConvNet, method)
    steps(sparse, 6, example(model), nm.SparsityScheduler(sparse, total_steps=10))
    torch.manual_seed(5)
    dense = ConvNet()
    sparse.load_state_dict(dense.state_dict(), strict=True)
    fresh = nm.compile(dense, example(dense), method=method)
    x = example(dense, batch=3)
    assert torch.equal(sparse.eval()(x), fresh.eval()(x))


@pytest.mark.ci(here=["saved0-", "saved3-"])
@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (
            {"method": nm.LBC()},
            {"method": nm.BiMask()},
            r"trained with LBC\(scores='position'\), the model is compiled for BiMask",
        ),
        ({"method": nm.LBC()}, {"method": nm.LBC(scores="combination")}, "scores='position'.*scores='combination'"),
        ({"pattern": "1:4"}, {"pattern": "2:4"}, r"conv1.weight of shape \[8, 8, 3, 3\] is 1:4 in this state_dict and 2:4"),
        ({"exclude": "conv1*"}, {}, "conv1.weight of shape .* is dense in this state_dict and 2:4"),
        ({"method": nm.SRSTE(), "pattern": "1:4"}, {"method": nm.SRSTE()}, "is 1:4 in this state_dict"),
    ],
)
def test_the_state_of_another_method_layout_or_pattern_is_refused_and_nothing_changes(
    saved: Any, loaded: Any, message: str
) -> None:
    model = ConvNet()
    theirs = nm.compile(model, example(model), **saved).state_dict()
    sparse = nm.compile(ConvNet(), example(model), **loaded)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    for wrapped, prefix in ((sparse, ""), (nn.ModuleDict({"inner": sparse}), "inner.")):
        with pytest.raises(nm.NMError, match=message):
            wrapped.load_state_dict({prefix + name: value for name, value in theirs.items()})
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        (nm.BiMask(), "conv1.weight_order", torch.zeros(8, dtype=torch.int64), "not a permutation"),
        (
            nm.Magnitude(),
            "conv1.weight_mask",
            torch.full((8, 9), 255, dtype=torch.uint8),
            "does not keep exactly 2 of every 4",
        ),
        (nm.LBC(), "conv1.weight_live", torch.zeros(8, 18, 1, dtype=torch.uint8), "a group has 0 live entries"),
        (nm.LBC(), "conv1.weight_live", torch.full((8, 18, 1), 255, dtype=torch.uint8), "that this pattern does not have"),
        (
            nm.LBC(),
            "conv1.weight_live",
            torch.ones(8, 9, 1, dtype=torch.uint8),
            r"of shape \[8, 9, 1\].*\[8, 18, 1\] is needed",
        ),
        (nm.LBC(), "conv1.weight_live", None, "conv1.weight_live is missing"),
        (nm.LBC(), "nm_recipe", None, "no 'nm_recipe'"),
        (nm.LBC(), "nm_recipe", torch.zeros(5, dtype=torch.uint8), "damaged"),
    ],
)
def test_damaged_state_is_refused_before_anything_is_loaded(method: Any, name: str, value: Any, message: str) -> None:
    sparse, _ = compiled(ConvNet, method)
    before = {key: v.clone() for key, v in sparse.state_dict().items()}
    wrong = {key: v + 1 if v.is_floating_point() else v for key, v in before.items()}
    wrong[name] = value
    if value is None:
        del wrong[name]
    with pytest.raises(nm.NMError, match=message):
        sparse.load_state_dict(wrong)
    assert all(torch.equal(v, before[key]) for key, v in sparse.state_dict().items())


@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask()], ids=lambda method: method.name)
def test_clients_of_federated_averaging_are_averaged_but_for_what_is_no_float(method: Any) -> None:
    server, _ = compiled(ConvNet, method)
    clients = [deepcopy(server) for _ in range(2)]
    for client in clients:  # as steps of their own leave them
        for weight in client.ready():
            for suffix in method.suffixes(weight.site):
                value = weight[suffix]
                if suffix == "live":
                    value.copy_(1 << torch.randint(6, value.shape))
                elif suffix == "order":
                    value.copy_(value[torch.randperm(len(value))])
    states = [client.state_dict() for client in clients]
    mean = {k: torch.stack([s[k].double() for s in states]).mean(0).to(v.dtype) for k, v in states[0].items()}
    with pytest.raises(nm.NMError, match="or the mean of several, .* average what is_floating_point"):
        server.load_state_dict(mean)
    server.load_state_dict({k: mean[k] if v.is_floating_point() else v for k, v in states[0].items()})
    nm.freeze(server, finish=True)


def trained(
    method: Any, total: int, stop: int | None = None, resume: Path | None = None, make: Callable[..., Any] = compiled
) -> dict[str, Any]:
    """Train with dropout and fixed seeds, saving at ``stop`` or going on from a file. Returns the final state."""
    torch.manual_seed(7)
    sparse, model = make(ConvNet, method, dropout=0.2)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = nm.SparsityScheduler(sparse, total_steps=total)
    first = 0
    if resume is not None:
        checkpoint = torch.load(resume, weights_only=True)
        sparse.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        first = scheduler.last_step
    for step in range(first, total):
        if step == stop:
            return {"model": sparse.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.manual_seed(100 + step)
        sparse(example(model, batch=4, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return dict(sparse.state_dict())


@pytest.mark.ci(here=["LBC(scores='position'"])
@each_method
def test_two_runs_with_one_seed_and_two_resumed_midway_are_bit_equal(method: Any, tmp_path: Path) -> None:
    straight = trained(method, 12)
    others = [trained(method, 12)]
    for stop in (3, 7):
        torch.save(trained(method, 12, stop=stop, make=copied), tmp_path / "half.pt")
        others.append(trained(method, 12, resume=tmp_path / "half.pt", make=copied))
    for other in others:
        assert straight.keys() == other.keys()
        for name, value in straight.items():
            assert torch.equal(value, other[name]), name
