# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""SparseModule behaves like the model it carries."""

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet, Grouped, Matmuls, dense, example, steps
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.links import has_modes

METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(interval=2, moves=40), nm.SRSTE(), nm.Magnitude()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m).split(", decay")[0])


def compiled(kind: type[nn.Module], method: Any = None, **options: Any) -> tuple[nm.SparseModule, Any]:
    model = kind(**options)
    return nm.compile(model, example(model), method=method or nm.LBC()), model


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
    torch.testing.assert_close(out, dense(model, x))
    assert not torch.allclose(out, sparse.train()(x))


def test_dropout_follows_the_mode() -> None:
    sparse, model = compiled(ConvNet, dropout=0.5)
    x = example(model)
    assert not torch.equal(sparse(x), sparse(x))
    sparse.eval()
    assert torch.equal(sparse(x), sparse(x))
    assert not model.dropout.training


def test_layers_of_the_model_may_be_called_like_what_its_carrier_keeps() -> None:
    names = ("frozen", "loads", "progress", "copy_known", "method", "plan")
    model, x = nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in names)), torch.randn(2, 8)
    sparse = nm.compile(model, x, method=nm.SRSTE(), include=["*"])
    scheduler = nm.SparsityScheduler(sparse, total_steps=1)
    sparse(x).sum().backward()
    scheduler.step()
    sparse.load_state_dict(sparse.state_dict())
    assert torch.equal(copy.deepcopy(sparse).eval()(x), sparse.eval()(x))
    assert set(nm.verify(nm.freeze(sparse)).satisfied) == {f"{name}.weight" for name in names}


def test_a_layer_switched_to_another_mode_than_captured_is_an_error_not_a_silent_difference() -> None:
    sparse, model = compiled(ConvNet)
    model.norm1.eval()
    with pytest.raises(nm.NMError, match=r"norm1 \(BatchNorm2d\) is in evaluation mode, but was captured in training mode"):
        sparse(example(model))
    sparse.train()
    sparse(example(model))


def test_an_activation_that_two_models_share_may_be_in_either_mode() -> None:
    shared = nn.SiLU()  # as the default of an argument is, of all models of a library
    teacher, model = (nn.Sequential(nn.Linear(8, 16), shared, nn.Linear(16, 16), nn.Dropout(0.5)) for _ in range(2))
    sparse = nm.compile(model, torch.randn(2, 8), include=["*"])
    teacher.eval()
    sparse(torch.randn(2, 8))
    asks = (nn.Dropout(), nn.BatchNorm1d(4), nn.InstanceNorm1d(4), nn.RReLU(), nn.MultiheadAttention(4, 1), MLP())
    assert not any(has_modes(layer) for layer in (shared, nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.LayerNorm(4)))
    assert all(has_modes(layer) for layer in (*asks, nn.utils.spectral_norm(nn.Linear(4, 4))))


def test_a_number_that_the_training_graph_holds_and_that_is_changed_is_an_error_not_ignored() -> None:
    sparse, model = compiled(ConvNet, dropout=0.5)
    x = example(model)
    for layer, name, value in ((model.dropout, "p", 0.1), (model.norm, "momentum", None)):
        captured = getattr(layer, name)
        setattr(layer, name, value)
        with pytest.raises(nm.NMError, match=rf"{name} is {value} now, and the captured graph holds {captured}: .*nm.freeze"):
            sparse(x)
        sparse.eval()(x)  # holds neither
        sparse.train()
        setattr(layer, name, captured)
        sparse(x)


class Dropped(MLP):
    """Its dropout is a number of its own, as in Hugging Face's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dropout = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, self.hidden_dropout, self.training))


def test_a_dropout_that_is_a_number_of_the_model_is_one_of_those() -> None:
    model = Dropped()
    sparse = nm.compile(model, example(model), method=nm.SRSTE())
    model.hidden_dropout = 0
    with pytest.raises(nm.NMError, match=r"^hidden_dropout is 0 now, and the captured graph holds 0\.5: "):
        sparse(example(model))
    sparse.eval()(example(model))


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", ["", "fc2"])
def test_a_hook_that_the_graph_would_not_call_is_an_error_not_ignored(kind: str, path: str) -> None:
    sparse, model = compiled(MLP)
    x = example(model)
    handle = getattr(model.get_submodule(path), kind)(lambda *_: None)
    for training in (True, False):
        with pytest.raises(nm.NMError, match=f"{path or 'the model'} .* got or lost a hook after nm.compile"):
            sparse.train(training)(x)
    handle.remove()
    sparse(x)
    called = list[Any]()
    sparse.register_forward_hook(lambda *_: called.append(1))
    sparse(x)
    assert called == [1]


def test_a_layer_without_weights_that_is_another_one_now_is_an_error_and_back_it_runs() -> None:
    sparse, model = compiled(ConvNet)
    x = example(model)
    expected = sparse.eval()(x)
    for path, module in [(path, module) for path, module in model.named_modules() if path and not list(module.parameters())]:
        parent = model.get_submodule(path.rpartition(".")[0])
        parent.add_module(path.rpartition(".")[2], nn.Tanh())
        with pytest.raises(nm.NMError, match=f"{path} was replaced after nm.compile"):
            sparse(x)
        parent.add_module(path.rpartition(".")[2], module)
    torch.testing.assert_close(sparse(x), expected)


def test_a_layer_of_a_captured_model_that_torch_compile_wraps_is_told_to_compile_the_whole() -> None:
    sparse, model = compiled(ConvNet)
    model.conv2 = torch.compile(model.conv2, backend="eager")
    with pytest.raises(nm.NMError, match=r"conv2 was replaced after nm.compile: torch.compile\(sparse\), of the whole model"):
        sparse(example(model))


def test_forward_hooks_from_before_are_in_the_graph_and_noted_and_backward_ones_are_refused() -> None:
    model = MLP()
    x = example(model)
    handle = model.fc2.register_forward_hook(lambda _module, _inputs, out: 3 * out)
    model.fc2.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
    sparse = nm.compile(model, (x,), method=nm.Magnitude())
    assert "Forward hooks of fc2 (Linear): what they compute is in the graph" in str(nm.report(sparse))
    hidden = torch.relu(model.fc1(x)) + 1
    wanted = model.fc3(torch.relu(3 * nn.functional.linear(hidden, sparse.masked("fc2.weight")[0], model.fc2.bias)))
    torch.testing.assert_close(sparse(x), wanted)
    handle.remove()
    with pytest.raises(nm.NMError, match="fc2 .Linear. got or lost a hook"):
        sparse(x)
    other = MLP()
    other.fc2.register_full_backward_hook(lambda _module, gradients, _outer: tuple(2 * g for g in gradients))
    names = set(other.state_dict())
    with pytest.raises(nm.NMError, match=r"fc2 \(Linear\) has a backward hook"):
        nm.compile(other, (x,))
    assert set(other.state_dict()) == names
    live = nm.compile(other, method=nm.SRSTE(decay=0.0), then="eager", include=["fc1*"], exclude=["fc2*", "fc3*"])
    live(x).sum().backward()
    doubled = other.fc1.weight.grad.clone()
    other.fc2._backward_hooks.clear()
    live.zero_grad()
    live(x).sum().backward()
    torch.testing.assert_close(doubled, 2 * other.fc1.weight.grad)


@pytest.mark.filterwarnings("ignore")
def test_what_traces_symbolically_is_told_to_come_before_or_after() -> None:
    sparse, _ = compiled(ConvNet)
    with pytest.raises(nm.NMError, match=r"torch.fx cannot trace this ConvNet: .* comes before nm.compile"):
        torch.fx.symbolic_trace(sparse)


def test_hooks_of_weight_norm_are_not_worth_a_note() -> None:
    model = MLP()
    torch.nn.utils.weight_norm(model.fc1)
    assert "hooks" not in str(nm.report(nm.compile(model, (example(model),))))


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


@pytest.mark.ci(here=["LBC(scores='position'"])
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


@pytest.mark.ci(here=["BiMask"])
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


@pytest.mark.ci
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


@pytest.mark.ci
def test_many_compiled_models_in_one_process_do_not_share_one_recompile_limit() -> None:
    with torch._dynamo.config.patch(recompile_limit=4):
        for _ in range(6):
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


def test_writing_state_takes_effect_at_the_next_forward() -> None:
    sparse, model = compiled(ConvNet, nm.LBC())
    sparse.eval()
    x = example(model)
    before = sparse(x)
    model.conv1.weight_live.fill_(1)  # combination {0, 1} alone
    assert not torch.equal(sparse(x), before)
    assert bool((nm.freeze(sparse, finish=True).conv1.weight[:, [2, 3, 6, 7]] == 0).all())


def test_methods_by_which_optimizers_group_parameters_are_the_models() -> None:
    class Telling(MLP):
        def no_weight_decay(self) -> set[str]:
            return {name for name, _ in self.named_parameters() if name.startswith("fc1")}

        def group_matcher(self, coarse: bool = False) -> dict[str, str]:
            return {"stem": "^fc1", "blocks": r"^fc(\d)"}

    model = Telling()
    sparse = nm.compile(model, (example(model),), method=nm.LBC())
    assert sparse.no_weight_decay() == {"fc1.weight", "fc1.bias"}
    assert sparse.group_matcher(coarse=True) == model.group_matcher()


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


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("gradient_checkpointing_enable", "a captured graph recomputes nothing: leave gradient_checkpointing out, or"),
        ("get_input_embeddings", "a hook on the embedding, as NEFTune's, .* compile it without example inputs"),
        ("save_pretrained", r"its weights are dense while it trains: nm.freeze\(model\) returns the model to save"),
        ("resize_token_embeddings", "call it before nm.compile, or after nm.freeze"),
        ("generate", "a method would run the dense weights. Freeze first"),
    ],
)
def test_a_method_that_libraries_call_is_absent_with_the_way_out(name: str, way_out: str) -> None:
    model = type("Pretrained", (MLP,), {name: lambda self: None})()
    sparse = nm.compile(model, (example(model),))
    assert not hasattr(sparse, name)
    with pytest.raises(nm.NMError, match=rf"Pretrained.{name} is not there once captured: .*{way_out}"):
        getattr(sparse, name)


@pytest.mark.parametrize("path", ["", "fc2"])
def test_a_forward_that_is_replaced_after_compile_is_an_error(path: str) -> None:
    sparse, model = compiled(MLP)
    layer = model.get_submodule(path)
    layer.forward = lambda x: x
    with pytest.raises(nm.NMError, match=rf"forward\(\) of {path or 'the model'} was replaced after nm.compile"):
        sparse(example(model))
    del layer.forward
    sparse(example(model))


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


def test_layers_of_a_sequential_can_be_looked_at_and_none_is_handed_out_to_run_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    sparse = nm.compile(model, (torch.randn(2, 8),), method=nm.SRSTE())
    assert sparse[2] is model[2]
    assert sparse[-1] is model[3]
    assert len(sparse) == 4
    for loop in (lambda: sparse[1:], lambda: list(sparse)):
        with pytest.raises(nm.NMError, match=r"dense.* nm.freeze returns"):
            loop()
    other = nm.compile(MLP(), (torch.randn(2, 8),), method=nm.SRSTE())
    assert other
    with pytest.raises(TypeError, match="this MLP has no __getitem__: its layers are attributes"):
        other[0]
