# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""nm.compile(model): the user's own model, its state made at once, its graphs taken by TorchDynamo when it is called."""

import copy
import inspect
import io
import logging
import pickle
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from models import MLP, Branching, ConvNet, example
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint

import nm_compiler as nm
from nm_compiler.live.live import Live
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.unwrapping import unwrap

METHODS = [nm.LBC(), nm.BiMask(interval=2, moves=40), nm.Magnitude(), nm.SSTE()]  # SSTE brings an op of its own
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
each_then = pytest.mark.parametrize("then", ["eager", "aot_eager"])


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    torch._dynamo.reset()  # it remembers which sizes changed, in other tests


def positive(batch: int = 4) -> Tensor:
    return torch.rand(batch, 8) + 0.1


def dense_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model without its carrier, planned weights replaced by what they are multiplied with now."""
    carrier = unwrap(model)
    values = {name: carrier.masked(name)[0].detach() for name in carrier.sites}
    carrier.active = True
    try:
        return functional_call(model, values, args, kwargs)
    finally:
        carrier.active = False


def train(model: nn.Module, x: Tensor, count: int, scheduler: Any = None) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(count):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


HOOKS: dict[str, Any] = {
    "of the whole model": lambda model, seen: model.register_forward_hook(lambda *_: seen.append(1)),
    "of a layer": lambda model, seen: model.fc2.register_forward_hook(lambda *_: seen.append(1)),
    "that leaves the graph": lambda model, seen: model.fc2.register_forward_hook(
        lambda _module, _inputs, out: seen.append(out.detach().numpy().sum())
    ),
    "before a layer": lambda model, seen: model.fc2.register_forward_pre_hook(lambda *_: seen.append(1)),
    "of gradients": lambda model, seen: model.fc2.register_full_backward_hook(lambda *_: seen.append(1)),
}


@pytest.mark.ci(here=["of a layer-eager"])
@each_then
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_a_hook_that_comes_after_the_first_call_is_called_until_it_goes(register: Any, then: str) -> None:
    model = MLP()
    nm.compile(model, method=nm.SRSTE(), then=then)
    x, seen = example(model), list[Any]()
    expected = model(x)
    for turn in (1, 2):
        handle = register(model, seen)
        result = model(x)
        result.sum().backward()
        assert len(seen) == turn
        handle.remove()
        for found in (result, model(x)):
            torch.testing.assert_close(found, expected, atol=0, rtol=0)
        assert len(seen) == turn
    torch.testing.assert_close(expected, dense_call(model, x))


def test_a_hook_may_change_what_a_layer_of_a_live_model_returns() -> None:
    model = MLP()
    nm.compile(model, method=nm.SRSTE(), then="eager")
    x = example(model)
    expected = model(x)
    handle = model.fc3.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    torch.testing.assert_close(model(x), 2 * expected)
    handle.remove()
    torch.testing.assert_close(model(x), expected)


def test_the_model_is_the_users_own_with_its_state_there_before_the_first_call() -> None:
    model = MLP()
    assert nm.compile(model, method=nm.LBC(), then="eager") is model
    assert type(model) is MLP
    assert isinstance(model.fc2.weight_scores, nn.Parameter)
    assert model.fc2.weight_live.dtype == torch.uint8
    model(example(model))
    assert not hasattr(model.fc1, "weight_scores")  # the stem: the first graph says so
    assert nm.report(model).totals["sparse"] == 1
    assert [row.reason.split(":")[0] for row in nm.report(model).rows] == ["stem", "training", "head"]


class LayerDrop(nn.Module):
    """Leaves a layer out by the toss of a coin, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.BatchNorm1d(16)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        h = self.norm(torch.relu(self.stem(x)))
        for layer in self.layers:
            if not self.training or torch.rand([]) >= 0.5:
                h = h + torch.relu(layer(h))
        return self.head(h)


def tossed(calls: int) -> Tensor:
    """Which layers `LayerDrop` runs, by call."""
    torch.manual_seed(1)
    return torch.stack([torch.rand([]) for _ in range(calls * 3)]).view(calls, 3) >= 0.5


def test_a_layer_that_the_model_leaves_out_by_chance_is_counted_as_often_as_it_ran() -> None:
    model, x = nm.compile(LayerDrop(), method=nm.LBC(), then="eager"), positive()
    model.eval()(x)
    ran = tossed(8).sum(0) + 1
    torch.manual_seed(1)
    train(model.train(), x, 8)
    assert 1 < ran.min() < ran.max() < 9
    found = {row.name: row.runs for row in nm.report(model).rows if row.status == "sparse"}
    assert found == {f"layers.{index}.weight": count for index, count in enumerate(ran.tolist())}


def test_a_mode_that_turns_out_to_come_in_fragments_runs_its_python_once() -> None:
    model, x = nm.compile(LayerDrop(), method=nm.LBC(), then="eager"), positive()
    model.eval()(x)
    model.train()(x)
    assert model.batches == 2
    assert model.norm.num_batches_tracked == 1


class Breaking(nn.Module):
    """A call in two parts; ``fails``: what lies between them raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x))
        torch._dynamo.graph_break()
        if self.fails:
            raise RuntimeError("no more")
        return self.layers[3](self.layers[2](x))


@pytest.mark.ci(here=["[eager"])
@each_then
def test_a_first_call_that_breaks_is_traced_once(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchDynamo takes a minute to trace a detector once."""
    model, count, compiled = nm.compile(Breaking(), method=nm.SRSTE(), then=then), [0], Live.compile

    def counted(self: Live, *args: Any) -> Any:
        count[0] += 1
        return compiled(self, *args)

    monkeypatch.setattr(Live, "compile", counted)
    x = positive()
    result = model(x)
    assert count == [2]  # both are looked at, planned on together and rewritten where they are
    assert [row.status for row in nm.report(model).rows] == ["dense", "sparse", "sparse", "dense"]
    assert [row.runs for row in nm.report(model).rows if row.status == "sparse"] == [1, 1]
    torch.testing.assert_close(result, dense_call(model, x))
    train(model, x, 2)
    torch.testing.assert_close(model(x), dense_call(model, x))


@pytest.mark.ci
def test_a_compiler_that_may_want_guards_of_its_own_traces_fragments_without_fixed_sizes_again() -> None:
    model, x = nm.compile(Breaking(), method=nm.SRSTE(), then="aot_eager"), positive(6)
    torch._dynamo.mark_dynamic(x, 0)
    torch.testing.assert_close(model(x), dense_call(model, x))
    assert [row.status for row in nm.report(model).rows] == ["dense", "sparse", "sparse", "dense"]
    other = positive(10)
    torch.testing.assert_close(model(other), dense_call(model, other))


@pytest.mark.ci
@each_then
def test_a_first_call_that_fails_halfway_leaves_no_dense_fragment_behind(then: str) -> None:
    model, x = nm.compile(Breaking(), method=nm.SRSTE(), then=then), positive()
    model.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more"):
            model(x)
    model.fails = False
    torch.testing.assert_close(model(x), dense_call(model, x))
    assert [row.status for row in nm.report(model).rows] == ["dense", "sparse", "sparse", "dense"]


def test_a_weight_that_is_first_met_within_a_call_leaves_no_trace_of_the_call_that_is_begun_again() -> None:
    model, x = nm.compile(LayerDrop(), method=nm.LBC(), then="eager"), positive()
    first, second = tossed(2).tolist()
    assert any(now and not before for before, now in zip(first, second, strict=True))
    torch.manual_seed(1)
    train(model, x, 2)
    assert model.batches == 2
    assert model.norm.num_batches_tracked == 2
    following = torch.rand([])
    tossed(2)
    assert following == torch.rand([])


@pytest.mark.ci(here=["LBC"])
@each_method
def test_schedule_report_verify_telemetry_and_freeze_work_on_it(method: nm.Method) -> None:
    model = nm.compile(ConvNet(), method=method, then="aot_eager")
    x = example(model)
    scheduler = nm.SparsityScheduler(model, total_steps=4)
    train(model, x, 4, scheduler)
    expected = model.eval()(x)
    torch.testing.assert_close(expected, dense_call(model, x))
    assert set(nm.Telemetry(model).measure()["weights"]) == {"conv1.weight", "conv2.weight"}
    assert 1 in nm.verify(model).satisfied["conv1.weight"]
    assert "nm." in nm.show(model)
    frozen = nm.freeze(model)
    assert frozen is model
    assert set(frozen.state_dict()) == set(ConvNet().state_dict())
    assert not any(
        key.startswith("_nm") or key == "_compiled_call_impl" for module in model.modules() for key in module.__dict__
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(frozen(x), expected)
    nm.compile(frozen, method=method, then="eager")  # and again


@pytest.mark.ci
def test_inductor_runs_it_with_changing_batches_and_without_gradients() -> None:
    model = nm.compile(MLP(), method=nm.BiMask())
    losses = train(model, example(model, 4), 2, nm.SparsityScheduler(model, total_steps=9))
    assert losses[1] < losses[0]
    for batch in (4, 6):
        torch.testing.assert_close(model(example(model, batch)), dense_call(model, example(model, batch)))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(example(model, 6)), dense_call(model, example(model, 6)))


def test_the_report_says_of_recurrent_layers_that_they_are_fused_though_no_fragment_shows_them() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lstm, self.cell = nn.Linear(8, 8), nn.LSTM(8, 8), nn.GRUCell(8, 8)
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.cell(self.lstm(self.stem(x))[0])))

    model = nm.compile(Recurrent(), method=nm.SRSTE(), then="eager")
    model(torch.randn(4, 8)).sum().backward()
    reasons = {row.name: row.reason for row in nm.report(model).rows if row.name.startswith(("lstm.", "cell."))}
    assert len(reasons) == 4
    assert all(reason.startswith("inside a fused LSTM, GRU or RNN op") for reason in reasons.values()), reasons


@pytest.mark.ci(here=["[eager]"])
@each_then
def test_control_flow_on_data_is_planned_as_a_whole_and_both_branches_are_sparse(then: str) -> None:
    model = nm.compile(Branching(), method=nm.SRSTE(), then=then).eval()
    x = positive()
    torch.testing.assert_close(model(x), dense_call(model, x))
    reasons = {row.name: row.reason for row in nm.report(model).rows}
    assert reasons["stem.weight"].startswith("stem: ")
    assert reasons["head.weight"].startswith("head: ")
    assert reasons["down.weight"] == "not read by any call so far"
    torch.testing.assert_close(model(-x), dense_call(model, -x))
    assert {row.name: row.runs for row in nm.report(model).rows if row.runs} == {
        "up.weight": 1, "down.weight": 1, "last.weight": 2,
    }  # fmt: skip
    model.train()(x).sum().backward()
    assert model.up.weight.grad is not None
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.ci
@each_then
def test_weights_under_checkpointing_and_in_branches_of_cond_are_sparse(then: str) -> None:
    class Bodies(Branching):
        recompute = True

        def block(self, y: Tensor) -> Tensor:
            return self.last(torch.tanh(self.stem(y)))

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
            return self.head(torch.cond(x.sum() > 0, lambda y: self.up(y), lambda y: self.down(y) * 2, (y,)))

    model, found = nm.compile(Bodies(), method=nm.LBC(), then=then), []
    x = positive()
    for recompute in (True, False):
        model.recompute = recompute
        torch.testing.assert_close(model(x), dense_call(model, x))
        model(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys() >= {"last.weight_scores", "up.weight_scores"}
    torch.testing.assert_close(found[0], found[1])
    assert "bodies.checkpointed" in nm.show(model)


def test_copies_and_saved_files_go_on_alone() -> None:
    model = nm.compile(MLP(), method=nm.LBC(), then="eager")
    x = example(model)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin(x), expected)
        assert unwrap(twin).origin is twin
        assert nm.report(twin).rows[1].runs == 1
        nm.SparsityScheduler(twin, total_steps=2).step()
        assert (nm.report(twin).rows[1].live, nm.report(model).rows[1].live) == (1.0, 6.0)
        nm.freeze(twin)


def test_state_dicts_go_between_live_models_and_from_dense_ones() -> None:
    model, other = (nm.compile(MLP(), method=nm.LBC(), then="eager") for _ in range(2))
    x = example(model)
    train(model, x, 3, nm.SparsityScheduler(model, total_steps=6))
    other.load_state_dict(model.state_dict())  # has not run yet: what the other one refused is refused
    torch.testing.assert_close(other(x), model(x))
    dense = MLP()
    other.load_state_dict(dense.state_dict())
    torch.testing.assert_close(other(x), dense(x))
    sparse = nm.compile(MLP(), (x,), method=nm.LBC())
    sparse.load_state_dict(model.state_dict())  # and between the two carriers
    torch.testing.assert_close(sparse(x), model(x))
    with pytest.raises(nm.NMError, match="was trained with Magnitude"):
        other.load_state_dict(nm.compile(MLP(), method=nm.Magnitude(), then="eager").state_dict())


def test_a_part_that_is_planned_late_leaves_earlier_forward_passes_their_state() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.two(torch.relu(self.one(self.stem(x)))))

    model, x = nm.compile(Two(), method=nm.LBC(), then="eager"), positive()
    loss = model.forward(x).square().mean()  # not model(x): layer by layer, each part planned when it comes
    (loss + model.forward(x[:2]).square().mean()).backward()
    torch.testing.assert_close(loss, dense_call(model, x).square().mean())
    assert all(model.get_parameter(name).grad is not None for name in unwrap(model).sites)


def test_parts_that_are_called_by_themselves_are_sparse_too() -> None:
    model = nm.compile(MLP(), method=nm.SRSTE(), include="*", then="eager")
    x = torch.randn(2, 16)
    expected = nn.functional.linear(x, unwrap(model).masked("fc2.weight")[0], model.fc2.bias)
    torch.testing.assert_close(model.fc2(x), expected)
    torch.testing.assert_close(model.forward(example(model)), dense_call(model, example(model)))


def test_a_step_over_parts_that_are_called_one_by_one_has_its_gradients() -> None:
    model = nm.compile(nn.Sequential(*(nn.Conv2d(8, 8, 1) if i % 2 else nn.BatchNorm2d(8) for i in range(5))), then="eager")
    dense, x = copy.deepcopy(model), torch.randn(2, 8, 4, 4)
    for layer in model:  # as a forward of the user's own does, which is not model.forward
        x = layer(x)
    x.square().mean().backward()  # buffers are put back at every first call, and autograd holds those of norms before it
    assert all(p.grad is not None for p in model.parameters())
    assert not torch.equal(model[0].running_mean, dense[0].running_mean)


def test_arithmetic_of_numpy_in_forward_is_what_it_is_without_the_watch() -> None:
    class Checked(MLP):
        def forward(self, x: Tensor) -> Tensor:
            size = np.array(x.shape)
            if (size % 2 > 0).any():  # as MONAI's SwinUNETR looks at its inputs
                raise ValueError(f"odd sizes {size}")
            size += 1
            left = 40 - size // 2 + 2**size - -size * (size < 3)
            return super().forward(x) * float((left & 31).sum())

    model, x = nm.compile(Checked(), method=nm.SRSTE(), then="eager"), torch.randn(2, 8)
    torch.testing.assert_close(model(x), dense_call(model, x))
    assert [row.status for row in nm.report(model).rows] == ["dense", "sparse", "dense"]


def test_a_compile_around_it_leaves_it_to_run_its_own_fragments() -> None:
    model = nm.compile(MLP(), method=nm.SRSTE(), then="eager")
    x = example(model)
    expected = 2 * dense_call(model(x) is not None and model, x)
    torch.testing.assert_close(torch.compile(lambda x: 2 * model(x), backend="eager")(x), expected)
    torch.testing.assert_close(2 * torch.compile(model, backend="eager")(x), expected)


def test_two_live_models_inside_a_third_module_are_each_their_own() -> None:
    first = nm.compile(MLP(), method=nm.LBC(), then="eager")
    second = nm.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)), pattern="1:4", then="eager")
    both = nn.Sequential(first, second)
    both(torch.randn(2, 8)).sum().backward()
    assert first.fc2.weight_scores.grad is not None
    assert {row.pattern for model in both for row in nm.report(model).rows} == {"2:4", "1:4", None}


def test_keywords_dicts_and_optional_arguments_pass_through() -> None:
    class Keywords(MLP):
        def forward(  # type: ignore[override]
            self, x: Tensor, *, scale: float = 1.0, extra: dict[str, Tensor] | None = None
        ) -> dict[str, Any]:
            y = super().forward(x) * scale
            return {"y": y if extra is None else y + extra["bias"], "none": None}

    model = nm.compile(Keywords(), then="eager")
    x = example(model)
    for given in ({}, {"scale": 2.0}, {"extra": {"bias": torch.ones(4)}}):
        output = model(x, **given)
        assert output["none"] is None
        torch.testing.assert_close(output["y"], dense_call(model, x, **given)["y"])


def test_a_raw_parameter_is_found_by_the_graph_and_what_is_none_loses_its_state() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 12), nn.Linear(8, 2)
            self.right, self.table = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(4, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.stem(x) + self.table) @ self.right)

    model = nm.compile(Raw(), method=nm.Magnitude(), then="eager")
    assert {"right_mask", "table_mask"} <= set(model.state_dict())
    x = torch.randn(4, 8)
    model(x)
    assert {name for name in model.state_dict() if name.endswith("_mask")} == {"right_mask"}
    assert nm.report(model).totals["sparse"] == 1
    assert nm.verify(nm.freeze(model)).satisfied["right"] == (0,)  # x @ W: groups run along axis 0


@pytest.mark.ci
def test_carriers_and_their_models_are_freed() -> None:
    import gc
    import weakref

    model = nm.compile(Branching(), method=nm.SRSTE(), then="aot_eager")
    model(positive()).sum().backward()
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_an_average_made_before_the_first_call_follows_what_the_first_graph_decides() -> None:
    model = nm.compile(MLP(), method=nm.LBC(), then="eager")
    average = torch.optim.swa_utils.AveragedModel(model)  # matches parameters by their order
    second = copy.deepcopy(average.module)
    train(model, example(model), 1)
    for twin in (average.module, second):
        assert twin.state_dict().keys() == model.state_dict().keys()
        assert [row.reason for row in nm.report(twin).rows] == [row.reason for row in nm.report(model).rows]
    average.update_parameters(model)
    torch.testing.assert_close(average(example(model)), model(example(model)))
    assert set(nm.verify(nm.freeze(average.module, finish=True)).satisfied) == {"fc2.weight"}


def test_a_copy_that_is_called_first_decides_for_itself() -> None:
    model = nm.compile(MLP(), method=nm.LBC(), then="eager")
    twin = copy.deepcopy(model)
    twin(example(twin))
    model(example(model))
    assert twin.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(twin(example(model)), model(example(model)))


def test_a_layer_without_weights_is_no_candidate() -> None:
    model = MLP()
    model.fc2.none = nn.utils.skip_init(nn.Linear, 16, 0)
    live = nm.compile(model, method=nm.LBC(), then="eager")
    assert [site.name for site in unwrap(live).plan.sites] == [name for name, p in MLP().named_parameters() if p.ndim == 2]


class Wrong(nn.Module):
    """Its second layer fits no input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = x * 2
        return self.head(self.wide(self.up(x)))  # 16 into 8


def test_an_op_that_fails_on_the_inputs_is_an_error_with_its_line_and_the_shapes() -> None:
    x, message = torch.ones(2, 8), r"Wrong fails on inputs \(float32\[2, 8\]\)\n  RuntimeError: .*16.*8[\s\S]*# 16 into 8"
    for call in (lambda: nm.compile(Wrong(), then="eager")(x), lambda: nm.compile(Wrong(), x)):
        with pytest.raises(nm.NMError, match=message) as error:
            call()
        assert type(error.value.__cause__) is RuntimeError
    model = nm.compile(MLP(), then="eager", method=nm.SRSTE())
    expected = model(x)
    with pytest.raises(nm.NMError, match=r"MLP fails on inputs \(float32\[2, 7\]\)"):
        model(torch.ones(2, 7))
    torch.testing.assert_close(model(x), expected)


def test_calls_from_several_threads_take_turns_and_none_runs_dense() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()  # so that the first of them compiles
    model, x = nm.compile(MLP(), then="eager", method=nm.SRSTE()).eval(), positive()
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(model(x) for _ in range(20))) for _ in range(4)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that others come in while it does
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    model(x)  # the turn of this thread
    expected = dense_call(model, x)
    assert len(found) == 80
    for result in found:
        torch.testing.assert_close(result, expected)
    carrier = unwrap(model)
    carrier.active, carrier.thread = True, -1  # as if another thread were inside now
    torch.testing.assert_close(model(x), expected)


def test_a_call_that_waits_long_for_its_turn_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nm_compiler.live.prepared._LONG_S", 0.05)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nm.compile(model, method=nm.SRSTE(), include="*", then="eager")
    model(torch.randn(4, 8))
    carrier, found = unwrap(model), list[Tensor]()
    with carrier._inside():  # as a forward that hands its work to another thread and waits for it
        other = threading.Thread(target=lambda: found.append(model(torch.randn(4, 8))))
        other.start()
        other.join(0.5)
        assert not found
        assert "waited 0.05 s for one in another thread" in caplog.text
    other.join(60)
    assert len(found) == 1


class Asking(MLP):
    """Breaks the graph with an item; ``wrong`` gives it an op that fails."""

    wrong = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        if self.wrong:
            x = torch.cat((x, x.new_ones(3, 3)))
        return self.fc3(torch.relu(self.fc2(x) if x.sum().item() > 0 else x))


@pytest.mark.ci(here=["as it is"])
@pytest.mark.parametrize("asked", [False, True], ids=["as it is", "TORCH_LOGS=dynamo"])
def test_what_torch_says_of_breaks_and_failing_ops_stays_away_unless_it_is_asked_for(
    asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.variables.tensor.TensorVariable._warn_capture_scalar_outputs.cache_clear()
    loggers = [logging.getLogger(name) for name in ("torch._dynamo.variables.tensor", "torch._subclasses.fake_tensor")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.addHandler(caplog.handler)
            logger.setLevel(logging.INFO if asked else logging.WARNING)
        model = nm.compile(Asking(), then="eager")
        model(positive())
        model.wrong = True
        with pytest.raises(nm.NMError, match="Asking fails on inputs"):
            model(positive())
        live = [record.getMessage()[:16] for record in caplog.records if record.name in [logger.name for logger in loggers]]
        assert {"Graph break from", "failed while att"} <= set(live) if asked else not live
        caplog.clear()
        torch.compile(Asking(), backend="eager")(positive())
        assert bool(caplog.records) != asked, "torch says it once a process: a live model does not use that up in silence"
        assert not any(logger.filters for logger in loggers)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(caplog.handler)
            logger.setLevel(level)


@pytest.mark.ci(here=["later"])
@pytest.mark.parametrize("called", [False, True], ids=["first call", "later"])
def test_functional_call_with_plain_tensors_is_an_error_that_says_so_and_its_ways_out_are_sparse(called: bool) -> None:
    torch.manual_seed(0)
    model, x = nm.compile(MLP().double(), method=nm.SRSTE(), then="eager"), positive().double()
    expected = model(x).detach() if called else None
    twice = {name: 2 * p.detach() for name, p in model.named_parameters()}
    with pytest.raises(nm.NMError, match=r"fc\d.weight of this MLP is a plain tensor in this call.*functional_call") as error:
        functional_call(model, twice, (x,))
    assert "_dynamo" not in str(error.value)
    if called:
        torch.testing.assert_close(model(x), expected)
    given = {name: nn.Parameter(value) for name, value in twice.items()}
    found = functional_call(model, given, (x,))
    masked = {**twice, "fc2.weight": twice["fc2.weight"] * magnitude_mask(twice["fc2.weight"], 2, 4, 1)}
    torch.testing.assert_close(found, functional_call(MLP().double(), masked, (x,)))
    found.sum().backward()
    assert given["fc2.weight"].grad is not None
    captured = nm.compile(MLP().double(), (x,), method=nm.SRSTE())
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    result = functional_call(captured, {name: value * leaf for name, value in twice.items()}, (x,))
    torch.testing.assert_close(result, found)
    assert torch.autograd.grad(result.sum(), leaf)[0] != 0


def test_an_optimizer_built_after_a_checkpoint_was_loaded_holds_what_it_held_when_it_was_saved() -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nm.compile(MLP(), method=nm.LBC(), then="eager")

    def run(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            model(positive()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # before the first call: scores of the head are in it
    scheduler = nm.SparsityScheduler(model, total_steps=8)
    run(model, optimizer, scheduler, 4)
    saved = copy.deepcopy([each.state_dict() for each in (model, optimizer, scheduler)])
    torch.manual_seed(1)
    run(model, optimizer, scheduler, 4)

    again = fresh()
    again.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.01)
    optimizer.load_state_dict(saved[1])
    scheduler = nm.SparsityScheduler(again, total_steps=8)
    scheduler.load_state_dict(saved[2])
    assert hasattr(again.fc3, "weight_scores")
    assert "dense in the state_dict" in str(nm.report(again))
    torch.manual_seed(1)
    run(again, optimizer, scheduler, 4)
    assert not hasattr(again.fc3, "weight_scores")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert set(nm.freeze(again).state_dict()) == set(MLP().state_dict())


class TwoTowers(nn.Module):
    """Its towers are also called one by one, through methods that multiply a parameter by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.projection = nn.Parameter(torch.randn(8, 8))
        self.initialise()

    def initialise(self) -> None:
        with torch.no_grad():
            self.projection.copy_(self.projection @ self.projection)

    def encode_left(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return torch.relu(self.left(x)) @ self.projection * scale

    @torch.no_grad()
    def encode_right(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.right(x)), self.projection.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.encode_left(x) + torch.relu(self.right(x)) @ self.projection


@pytest.mark.ci(here=["[eager"])
@each_then
def test_methods_that_multiply_a_parameter_by_hand_run_sparse_from_outside(then: str) -> None:
    model, x = nm.compile(TwoTowers(), method=nm.Magnitude(), include=["*"], then=then), torch.randn(4, 8)
    model(x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    dense = copy.deepcopy(model.projection.detach())
    for each in (model, twin):
        assert [*inspect.signature(each.encode_left).parameters] == ["x", "scale"]
        left, right = each.encode_left(x, scale=2.0), each.encode_right(x)
        left.sum().backward()
        masked = unwrap(each).masked("projection")[0]
        assert (masked == 0).sum() == 32
        assert (each.projection.grad[masked == 0] == 0).all()
        assert each(x).requires_grad
        frozen = nm.freeze(each)
        assert not any("encode" in name for name in vars(frozen))
        torch.testing.assert_close(left, frozen.encode_left(x, scale=2.0))
        torch.testing.assert_close(right, frozen.encode_right(x))
    assert not torch.equal(dense, model.projection)


def test_a_method_that_gets_no_tensor_runs_as_it_is() -> None:
    model, x = nm.compile(TwoTowers(), method=nm.Magnitude(), include=["*"], then="eager"), torch.randn(4, 8)
    model(x)
    squared = model.projection.detach() @ model.projection.detach()
    model.initialise()
    assert torch.equal(model.projection, squared)


class Joinable(nn.Module):
    """Two layers that can be joined into a new one, which then runs in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.joined: nn.Linear | None = None

    def join(self) -> None:
        self.joined = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        both = torch.cat((self.a(x), self.b(x)), -1) if self.joined is None else self.joined(x)
        return self.head(torch.relu(both[:, :8] * both[:, 8:]))


def test_a_weight_that_came_after_compile_is_in_the_log_and_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nm.compile(Joinable(), method=nm.LBC(), then="eager"), torch.randn(4, 8)
    model(x)
    assert "joined.weight" not in str(nm.report(model))
    model.join()
    caplog.clear()
    model(x)
    model(x)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["joined.weight"]
    (row,) = (row for row in nm.report(model).rows if row.name == "joined.weight")
    assert (row.status, row.reason.split(":")[0]) == ("dense", "added after nm.compile")
    assert "joined.weight" in copy.deepcopy(model).state_dict()
    assert not nm.verify(nm.freeze(model, finish=True), "2:4").satisfied.get("joined.weight")


def test_a_weight_that_is_no_parameter_of_its_layer_any_more_is_an_error_and_fine_once_it_is_back() -> None:
    torch.manual_seed(0)
    model, x = nm.compile(MLP(), method=nm.SRSTE(), then="eager"), positive()
    expected = model(x)
    per_sample = call_for_per_sample_grads(model, batch_size=len(x))  # TorchDynamo compiles nothing over its tensors
    with pytest.raises(nm.NMError, match=r"fc2\.weight of this MLP is a plain tensor in this call"):
        per_sample(x)
    prune.l1_unstructured(model.fc2, "weight", 0.5)
    with pytest.raises(
        nm.NMError, match=r"fc2\.weight is no parameter of its layer any more, as where torch\.nn\.utils\.prune"
    ):
        model(x)
    for _ in range(2):
        with pytest.raises(nm.NMError, match=r"fc2\.weight is no parameter of its layer any more"):
            nm.verify(model)
        prune.remove(model.fc2, "weight")
        nm.verify(model)  # which keeps a graph of the weights
        prune.l1_unstructured(model.fc2, "weight", 0.5)
    prune.remove(model.fc2, "weight")
    assert not torch.equal(model(x), expected)


def test_a_layer_that_torch_compile_wraps_after_nm_compile_is_an_error_and_compiled_in_its_place_it_is_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8))
    nm.compile(model, method=nm.SRSTE(), then="eager")
    x = positive()
    expected, block = model(x), model[1]
    model[1] = torch.compile(block, backend="eager")
    with pytest.raises(
        nm.NMError, match=r"1 was replaced after nm.compile.* elsewhere, and torch.compile\(layer\) is not needed"
    ):
        model(x)
    model[1] = block
    block.compile(backend="eager")
    torch.testing.assert_close(model(x), expected)


def test_a_block_that_python_calls_and_that_is_compiled_by_itself_after_nm_compile_is_told_so() -> None:
    class Looping(nn.Module):
        """Calls its blocks from Python, as hooks of FSDP2 make a model do."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                torch._dynamo.graph_break()
                x = block(x)
            y: Tensor = self.last(x)
            return y

    model = nm.compile(Looping(), method=nm.SRSTE(), then="eager")
    x = positive()
    expected = model(x)
    model.blocks[0].compile(backend="eager")
    with pytest.raises(nm.NMError, match=r"this Sequential was prepared by nm.compile, and compile\(\) on it now"):
        model(x)
    torch.testing.assert_close(model(x), expected)
