# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""SparseModule behaves like the model it carries."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet, Grouped, Matmuls, example
from torch import Tensor, nn

import nm_compiler as nm

METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(interval=2, moves=40), nm.SRSTE(), nm.Magnitude()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m).split(", decay")[0])


def compiled(kind: type[nn.Module], method: Any = None, **options: Any) -> tuple[nm.SparseModule, Any]:
    model = kind(**options)
    return nm.compile(model, example(model), method=method or nm.LBC()), model


def steps(sparse: nn.Module, count: int, x: Tensor, scheduler: nm.SparsityScheduler | None = None) -> None:
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    for _ in range(count):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


def test_parameters_buffers_and_keys_are_the_models_own_plus_the_state() -> None:
    sparse, model = compiled(ConvNet)
    dense = ConvNet()
    extra = set(sparse.state_dict()) - set(dense.state_dict())
    assert set(dense.state_dict()) < set(sparse.state_dict())
    assert extra == {"nm_recipe", "conv1.weight_scores", "conv1.weight_live", "conv2.weight_scores", "conv2.weight_live"}
    assert dict(sparse.named_parameters())["conv1.weight"] is model.conv1.weight
    assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert sparse.conv1 is model.conv1


def test_batch_norm_statistics_update_in_training_and_are_used_in_evaluation() -> None:
    sparse, model = compiled(ConvNet)
    x = example(model, batch=16) + 2
    before = model.norm.running_mean.clone()
    sparse(x)
    assert int(model.norm.num_batches_tracked) == 1
    assert not torch.equal(model.norm.running_mean, before)
    sparse.eval()
    frozen = model.norm.running_mean.clone()
    out = sparse(x)
    assert torch.equal(model.norm.running_mean, frozen)
    torch.testing.assert_close(out, model(x))
    assert not torch.allclose(out, sparse.train()(x))


def test_dropout_follows_the_mode() -> None:
    sparse, model = compiled(ConvNet, dropout=0.5)
    x = example(model)
    assert not torch.equal(sparse(x), sparse(x))
    sparse.eval()
    assert torch.equal(sparse(x), sparse(x))
    assert not model.dropout.training


def test_a_layer_switched_to_another_mode_than_captured_is_an_error_not_a_silent_difference() -> None:
    sparse, model = compiled(ConvNet)
    model.norm1.eval()
    with pytest.raises(nm.NMError, match=r"norm1 \(BatchNorm2d\) is in evaluation mode, but was captured in training mode"):
        sparse(example(model))
    sparse.train()
    sparse(example(model))


def test_a_model_whose_own_train_keeps_a_layer_frozen_is_captured_that_way() -> None:
    class FrozenNorm(ConvNet):
        def train(self, mode: bool = True) -> "FrozenNorm":
            super().train(mode)
            self.norm.eval()
            return self

    sparse, model = compiled(FrozenNorm)
    sparse.train()
    before = model.norm.running_mean.clone()
    sparse(example(model) + 3)
    assert torch.equal(model.norm.running_mean, before)
    assert int(model.norm1.num_batches_tracked) == 1


@each_method
@pytest.mark.parametrize("kind", [ConvNet, Matmuls, Attention])
def test_deepcopies_and_saved_files_go_on_alone_with_the_same_function(kind: type[nn.Module], method: Any) -> None:
    sparse, model = compiled(kind, method)
    x = example(model, batch=3)
    steps(sparse, 3, x, nm.SparsityScheduler(sparse, total_steps=10))
    expected = sparse.eval()(x)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(sparse), torch.load(buffer, weights_only=False)]
    steps(sparse.train(), 2, x)
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert nm.show(twin) == nm.show(sparse)
        steps(twin.train(), 1, x, nm.SparsityScheduler(twin, total_steps=10))
        assert not torch.equal(twin.eval()(x), expected)
        nm.freeze(twin, finish=True)


@each_method
def test_the_whole_graph_compiles_without_a_break_and_trains_the_same(method: Any) -> None:
    torch.manual_seed(1)
    sparse, model = compiled(ConvNet, method)
    twin = copy.deepcopy(sparse)
    fast = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for batch in (4, 4, 7):
        x = example(model, batch=batch, seed=batch)
        for module in (sparse, fast):
            module(x).square().mean().backward()
        torch.testing.assert_close(fast(x), sparse(x))
    for (name, parameter), other in zip(sparse.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    scheduler = nm.SparsityScheduler(fast, total_steps=4)
    for _ in range(4):
        scheduler.step()
    x = example(model, batch=7)
    torch.testing.assert_close(fast(x), twin(x))


def test_inductor_compiles_it_too() -> None:
    sparse, model = compiled(MLP, nm.BiMask())
    fast = torch.compile(copy.deepcopy(sparse), fullgraph=True)
    x = example(model, batch=5)
    torch.testing.assert_close(fast(x), sparse(x))
    fast(x).sum().backward()
    sparse(x).sum().backward()
    torch.testing.assert_close(fast.fc2.weight.grad, model.fc2.weight.grad)


def test_a_compiled_carrier_refuses_the_other_branch_and_a_switched_layer_as_the_eager_one_does() -> None:
    class Branch(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (100.0 if x.shape[0] > 10 else 0.0)

    sparse, model = compiled(Branch)
    fast = torch.compile(sparse, backend="eager")
    torch.testing.assert_close(fast(example(model, batch=9)), sparse(example(model, batch=9)))
    with pytest.raises(nm.NMError, match="size 11 on axis 0"):
        fast(example(model, batch=11))
    sparse, model = compiled(ConvNet, dropout=0.5)
    fast = torch.compile(sparse, backend="eager")
    fast(example(model))
    model.dropout.eval()
    with pytest.raises(nm.NMError, match=r"dropout \(Dropout\) is in evaluation mode"):
        fast(example(model))


def test_one_value_a_channel_is_refused_in_training_before_it_ruins_the_running_variance() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2))
    sparse = nm.compile(model, torch.randn(4, 8))
    with pytest.raises(nm.NMError, match="size 1 on axis 0, and batch norm in training needs 2 or more"):
        sparse(torch.randn(1, 8))
    assert bool(model[1].running_var.isfinite().all())
    assert sparse.eval()(torch.randn(1, 8)).shape == (1, 2)


@each_method
def test_a_dense_state_dict_of_a_model_with_two_names_for_one_layer_loads_strictly(method: Any) -> None:
    class Alias(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.fc2

    sparse, _ = compiled(Alias, method)
    sparse.load_state_dict(Alias().state_dict(), strict=True)
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


def test_many_compiled_models_in_one_process_do_not_share_one_recompile_limit() -> None:
    for _ in range(10):
        sparse, model = compiled(MLP, nm.SRSTE())
        fast = torch.compile(sparse, fullgraph=True, backend="eager")
        torch.testing.assert_close(fast(example(model, batch=5)), sparse(example(model, batch=5)))


def test_moving_and_casting_moves_the_state_and_the_constants_with_the_model() -> None:
    sparse, model = compiled(Grouped, nm.LBC())
    x = example(model)
    sparse.double()
    assert model.grouped.weight_scores.dtype == torch.float64
    assert model.grouped.weight_live.dtype == torch.uint8
    assert sparse(x.double()).dtype == torch.float64
    sparse.to("meta")
    assert sparse(x.double().to("meta")).shape == (2, 3)


def test_a_factory_captured_on_one_device_follows_the_model_to_another() -> None:
    class Factory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + torch.arange(8, device=x.device))

    sparse = nm.compile(Factory(), torch.randn(2, 8), include="*")
    assert sparse.to("meta")(torch.randn(2, 8, device="meta")).device.type == "meta"


@each_method
def test_a_state_dict_round_trip_gives_the_same_function(method: Any) -> None:
    sparse, model = compiled(ConvNet, method)
    x = example(model, batch=3)
    steps(sparse, 6, x, nm.SparsityScheduler(sparse, total_steps=10))
    other, _ = compiled(ConvNet, method)
    other.load_state_dict(sparse.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), sparse.eval()(x))
    assert all(torch.equal(value, sparse.state_dict()[name]) for name, value in other.state_dict().items())


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


def test_writing_state_takes_effect_at_the_next_forward() -> None:
    sparse, model = compiled(ConvNet, nm.LBC())
    sparse.eval()
    x = example(model)
    before = sparse(x)
    model.conv1.weight_live.fill_(1)  # combination {0, 1} alone
    assert not torch.equal(sparse(x), before)
    assert bool((nm.freeze(sparse, finish=True).conv1.weight[:, [2, 3, 6, 7]] == 0).all())


def test_plain_attributes_are_the_models_and_its_other_methods_do_not_run_dense_by_mistake() -> None:
    class Named(MLP):
        classes = 4

        def features(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x))

    sparse, _ = compiled(Named)
    assert sparse.classes == 4
    assert not hasattr(sparse, "features")
    with pytest.raises(AttributeError, match="only forward"):
        _ = sparse.features
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = sparse.nothing_like_it


def test_two_models_with_two_patterns_live_in_one_process() -> None:
    one, two = MLP(), MLP()
    first = nm.compile(one, example(one), pattern="2:4", method=nm.LBC())
    second = nm.compile(two, example(two), pattern="1:8", method=nm.LBC())
    x = example(one)
    for sparse in (first, second):
        steps(sparse, 10, x, nm.SparsityScheduler(sparse, total_steps=10))
    assert set(nm.verify(nm.freeze(first), "2:4").satisfied) == {"fc2.weight"}
    assert set(nm.verify(nm.freeze(second), "1:8").satisfied) == {"fc2.weight"}
    assert not nm.verify(one, "1:8").satisfied


def trained(method: Any, total: int, stop: int | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Train with dropout and fixed seeds, saving at ``stop`` or going on from a file. Returns the final state."""
    torch.manual_seed(7)
    sparse, model = compiled(ConvNet, method, dropout=0.2)
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


@each_method
@pytest.mark.parametrize("stop", [3, 7])
def test_a_run_resumed_midway_continues_bit_equal_and_two_runs_with_one_seed_are_bit_equal(
    method: Any, stop: int, tmp_path: Path
) -> None:
    straight = trained(method, 12)
    again = trained(method, 12)
    torch.save(trained(method, 12, stop=stop), tmp_path / "half.pt")
    resumed = trained(method, 12, resume=tmp_path / "half.pt")
    for other in (again, resumed):
        assert straight.keys() == other.keys()
        for name, value in straight.items():
            assert torch.equal(value, other[name]), name
