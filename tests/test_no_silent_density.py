# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Every way in which TorchDynamo could run a prepared weight dense, and what the user is told instead."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MLP, Branching, Breaking, Matmuls, example
from test_live import dense_call, positive
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import nm_compiler as nm
from nm_compiler.unwrapping import unwrap


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    torch._dynamo.reset()


def live(model: nn.Module, **options: Any) -> Any:
    return nm.compile(model, **{"method": nm.SRSTE(), "then": "eager", **options})


class Disabled(Branching):
    """A weight that runs in a function TorchDynamo is told to leave alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left_alone(self.up(self.stem(x))))

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def left_alone(self, y: Tensor) -> Tensor:
        return nn.functional.linear(y, self.last.weight)  # dense here


def test_a_disabled_function_that_reads_a_weight_is_an_error_with_its_line() -> None:
    model = live(Disabled())
    with pytest.raises(nm.NMError, match=r"last.weight is read by code that TorchDynamo does not compile[\s\S]*# dense here"):
        model(positive())
    told = live(Disabled(), exclude="last.weight")
    told(positive())
    assert {row.name for row in nm.report(told).rows if row.status == "sparse"} == {"up.weight"}


def test_a_disabled_function_that_calls_a_layer_is_an_error_too() -> None:
    class Calls(Disabled):
        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def left_alone(self, y: Tensor) -> Tensor:
            return self.last(y)

    with pytest.raises(nm.NMError, match="last.weight is read by code"):
        live(Calls())(positive())


class FusedHead(nn.Module):
    """A head whose loss is computed in slices of its weight by code that is not compiled; tied to the table or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 8, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.in_slices(self.down(torch.relu(self.up(self.table(x)))), self.head.weight)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def in_slices(self, y: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([torch.mm(y, weight[at : at + 4].to(y.dtype).t()) for at in range(0, weight.shape[0], 4)], 1)


@pytest.mark.parametrize(("tied", "options"), [(False, {}), (True, {}), (False, {"exclude": "head.weight"})])
def test_a_head_that_python_multiplies_stays_dense_and_the_weight_before_it_is_no_head(
    tied: bool, options: dict[str, Any]
) -> None:
    x = torch.arange(4)
    model = live(FusedHead(tied), **options)
    model(x).sum().backward()
    rows = {row.name: row for row in nm.report(model).rows}
    assert [name for name, row in rows.items() if row.status == "sparse"] == ["up.weight", "down.weight"]
    if not tied:
        said = "excluded by 'head.weight'" if options else "multiplied by Python that TorchDynamo does not compile"
        assert rows["head.weight"].reason.startswith(said)
    if not tied and not options:
        with pytest.raises(nm.NMError, match="head.weight is read by code that TorchDynamo does not compile"):
            live(FusedHead(tied), include="*")(x)


def test_a_table_that_python_looks_up_comes_before_the_first_layer() -> None:
    class Looped(FusedHead):
        def forward(self, x: Tensor) -> Tensor:
            y = self.table(x)
            for layer in (self.up, self.down):  # a loop that branches on data stays Python
                if y.sum() != 0:
                    y = torch.relu(layer(y))
            return self.head(y)

    model = live(Looped(tied=False))
    model(torch.arange(4))
    rows = {row.name: row for row in nm.report(model).rows}
    assert rows["table.weight"].reason == "an embedding: rows are looked up, not multiplied"
    assert [name for name, row in rows.items() if row.status == "sparse"] == ["up.weight", "down.weight"]


def test_a_frame_that_dynamo_skips_is_an_error() -> None:
    class Skipped(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    torch._dynamo.eval_frame.skip_code(Skipped.forward.__code__)
    model = live(Skipped())
    try:
        found = model(example(model))
    except nm.NMError as error:
        assert "is read by code that TorchDynamo does not compile" in str(error)  # noqa: PT017
    else:  # or what it calls was compiled after all
        torch.testing.assert_close(found, dense_call(model, example(model)))
        assert nm.report(model).rows[1].runs


def test_with_dynamo_switched_off_there_is_an_error_and_on_again_it_runs() -> None:
    model = live(MLP())
    off = torch._dynamo.config.patch(disable=True)
    with off, pytest.raises(nm.NMError, match="TorchDynamo is switched off .* the weights of this MLP would be dense"):
        model(example(model))
    x, expected = example(model), model(example(model))
    with off, pytest.raises(nm.NMError, match="TorchDynamo is switched off"):
        model(x)
    torch.testing.assert_close(model(x), expected)


def test_where_dynamo_is_told_to_leave_all_to_python_there_is_an_error() -> None:
    model = live(MLP())
    with torch.compiler.set_stance("force_eager"), pytest.raises(nm.NMError, match=r"fc\d.weight is read by code that Torch"):
        model(example(model))
    x, expected = example(model), model(example(model))  # and on again
    with torch.compiler.set_stance("force_eager"):
        try:
            torch.testing.assert_close(model(x), expected)  # what was compiled before may still run
        except nm.NMError as error:
            assert "is read by code that TorchDynamo" in str(error)  # noqa: PT017


def test_past_the_recompile_limit_there_is_an_error_and_the_users_settings_stay(monkeypatch: Any) -> None:
    class Named(MLP):
        def forward(self, x: Tensor, name: str = "a") -> Tensor:
            return super().forward(x) + len(name) if name != "b" else super().forward(x)

    monkeypatch.setattr("nm_compiler.fragments.dynamo._LIMIT", 3)
    config = torch._dynamo.config
    before = (config.fail_on_recompile_limit_hit, config.suppress_errors, config.optimize_ddp)
    model = live(Named())
    with config.patch(recompile_limit=3), pytest.raises(nm.NMError, match="would run it without masks"):
        _ = [model(example(model), name) for name in "abcdefgh"]
    assert (config.fail_on_recompile_limit_hit, config.suppress_errors, config.optimize_ddp) == before


@pytest.mark.parametrize("strict", [False, True], ids=["", "and TorchDynamo told to fail at its limit, as by name"])
def test_suppressed_errors_are_not_suppressed_for_a_live_model(strict: bool) -> None:
    with torch._dynamo.config.patch(suppress_errors=True, fail_on_recompile_limit_hit=strict):
        with pytest.raises(nm.NMError, match="last.weight is read by code"):
            live(Disabled())(positive())
        assert torch._dynamo.config.suppress_errors


def test_a_graph_break_leaves_nothing_dense() -> None:
    model = live(Breaking())
    torch.testing.assert_close(model(example(model)), dense_call(model, example(model)))
    assert [row.runs for row in nm.report(model).rows] == [None, 1, None]


def test_a_weight_that_the_first_call_does_not_read_is_told_and_sparse_when_it_is_read(caplog: Any) -> None:
    model = live(Branching()).eval()
    with caplog.at_level(logging.WARNING, "nm_compiler"):
        model(positive())
        model(positive())
    assert [r.getMessage() for r in caplog.records if r.name.startswith("nm_compiler")] == [
        "down.weight: prepared, but not read by the first call; each becomes sparse in the first call that reads it"
    ]
    torch.testing.assert_close(model(-positive()), dense_call(model, -positive()), check_stride=False, rtol=1e9, atol=1e9)
    assert {row.name: row.runs for row in nm.report(model).rows}["down.weight"] == 1


def test_a_path_that_uses_a_planned_weight_in_another_way_is_an_error() -> None:
    class Other(MLP):
        def forward(self, x: Tensor, penalty: bool = False) -> Tensor:
            y = super().forward(x)
            return y + self.fc2.weight.sum() if penalty else y

    model = live(Other())
    model(example(model))
    with pytest.raises(
        nm.NMError, match=r"fc2.weight of shape \[16, 16\] was planned as 2:4, but another path has it read by"
    ):
        model(example(model), penalty=True)


def test_layers_and_weights_that_were_replaced_are_an_error_or_taken_up() -> None:
    model = live(MLP(), method=nm.LBC())
    model(example(model))
    model.fc2.weight = nn.Parameter(torch.randn(16, 16))  # of the same shape: the state beside it still fits
    torch.testing.assert_close(model(example(model)), dense_call(model, example(model)))
    assert not torch.equal(model.fc2.weight, nm.verify(model) and model.fc1.weight)
    model.fc2 = nn.Linear(16, 16)
    with pytest.raises(nm.NMError, match=r"fc2 was replaced after nm.compile[\s\S]*nm.freeze"):
        model(example(model))


def test_a_container_that_forward_swaps_keeps_its_layers_sparse_and_other_layers_in_it_are_an_error() -> None:
    class Holder(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, y: Tensor) -> Tensor:
            return self.layer(y)

    class Swaps(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.fc2 = Holder(self.fc2)

        def forward(self, x: Tensor) -> Tensor:
            self.fc2 = Holder(self.fc2.layer)
            return super().forward(x)

    model = live(Swaps())
    for _ in range(3):
        model(example(model))
    assert next(row.runs for row in nm.report(model).rows if row.name == "fc2.layer.weight") == 3
    y = torch.randn(2, 16)
    alone = model.fc2(y)  # a part that is called by itself
    torch.testing.assert_close(
        alone, nn.functional.linear(y, unwrap(model).masked("fc2.layer.weight")[0], model.fc2.layer.bias)
    )
    model.fc2 = Holder(copy.deepcopy(model.fc2.layer))
    with pytest.raises(nm.NMError, match=r"fc2[.layer]* was replaced after nm.compile"):
        model(example(model))


def test_an_optimizer_built_before_preparation_is_found_out() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live(model, method=nm.LBC())
    with pytest.raises(nm.NMError, match="does not hold"):
        nm.SparsityScheduler(model, total_steps=3, optimizer=optimizer)
    scheduler = nm.SparsityScheduler(model, total_steps=3)
    model(example(model)).sum().backward()
    optimizer.step()
    with pytest.raises(nm.NMError, match=r"changed the weights, but not fc2.weight_scores"):
        scheduler.step()


def test_freezing_before_the_first_call_says_that_no_graph_is_known() -> None:
    with pytest.raises(nm.NMError, match="has not run since nm.compile"):
        nm.freeze(live(MLP()))


def test_freezing_what_has_read_no_weight_that_can_be_sparse_says_why() -> None:
    class Flipped(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.fc1(x), self.fc2.weight.flip(1))

    model = live(Flipped())
    model(positive())
    with pytest.raises(
        nm.NMError, match=r"(?s)no call of this Flipped so far has read .* 2:4:.*fc2.weight: indexed along the axis"
    ):
        nm.freeze(model)


def test_a_weight_that_no_call_ever_read_stays_dense_when_the_model_is_frozen() -> None:
    model = live(Branching(), method=nm.Magnitude()).eval()
    model(positive())
    before = model.down.weight.clone()
    frozen = nm.freeze(model)
    assert torch.equal(frozen.down.weight, before)
    assert set(frozen.state_dict()) == set(Branching().state_dict())


def test_torch_func_around_a_live_model_is_an_error_that_names_the_way_out() -> None:
    for model in (live(MLP()), nm.compile(Branching(), positive(), method=nm.SRSTE())):
        x = torch.rand(2, 8) if isinstance(unwrap(model).origin, MLP) else positive()
        model(x)
        parameters = dict(model.named_parameters())
        with pytest.raises(nm.NMError, match=r"called inside torch.func .* would be dense: take loss.backward\(\)"):
            torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).sum())(parameters)  # noqa: B023


@pytest.mark.parametrize("called", [False, True])
def test_tracers_that_would_take_the_weights_of_a_live_model_dense_are_an_error(called: bool) -> None:
    model, x = live(MLP()), positive()
    if called:
        model(x)
    tracers: dict[str, Callable[[], Any]] = {
        "torch.export": lambda: torch.export.export(model, (x,)),
        "torch.jit.trace": lambda: torch.jit.trace(model, x),
        "make_fx": lambda: make_fx(model)(x),
        "torch.fx": lambda: torch.fx.symbolic_trace(model),
        "torch.jit.script": lambda: torch.jit.script(model),
    }
    for name, trace in tracers.items():
        with pytest.raises(nm.NMError, match=f"{name} would take its weights dense. Trace what nm.freeze"):
            trace()
    model(x)
    frozen = nm.freeze(model)
    assert torch.equal(torch.export.export(frozen, (x,)).module()(x), frozen(x))
    assert torch.equal(torch.fx.symbolic_trace(frozen)(x), frozen(x))
    assert torch.equal(torch.jit.script(frozen)(x), frozen(x))


def test_a_part_or_a_copy_of_a_live_model_keeps_its_name_and_is_traced_no_more_than_the_whole() -> None:
    whole = live(nn.Sequential(Matmuls(), nn.Linear(4, 4)))
    for model in (whole, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert model._get_name() == "Sequential"
        for trace in (torch.fx.symbolic_trace, torch.jit.script):
            with pytest.raises(nm.NMError, match=r"this (Sequential|Matmuls) was prepared .* would take its weights dense"):
                trace(nn.Sequential(model))


@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.script(nn.Sequential(model))])
def test_torch_jit_script_is_told_that_a_compiled_model_is_a_graph(script: Callable[[nn.Module], Any]) -> None:
    sparse = nm.compile(MLP(), (positive(),))
    with pytest.raises(nm.NMError, match="this MLP is a graph: script what nm.freeze returns"):
        script(sparse)
    frozen = nm.freeze(sparse)
    with pytest.raises(nm.NMError, match="this lowered MLP is a graph: record a call with torch.jit.trace"):
        script(nm.lower(frozen, (positive(),)))


@pytest.mark.parametrize("given", [(), (positive(),)])
def test_the_report_of_a_part_of_a_compiled_model_says_that_its_masks_are_elsewhere(given: tuple[Any, ...]) -> None:
    model = nn.Sequential(MLP(), nn.Linear(4, 4))
    compiled = nm.compile(model, given) if given else live(model)
    compiled(positive())
    part = nm.report(compiled[0])
    assert part.notes == (
        "fc2.weight, fc3.weight: part of a model that nm.compile returned, whose masks are not in these values: report that one.",
    )
    assert not nm.report(nn.Sequential(compiled)).notes
    assert not nm.report(nm.freeze(compiled)[0]).notes


def test_a_layer_that_took_the_hooks_of_a_prepared_one_but_not_its_masks_is_an_error() -> None:
    model = live(MLP())
    other = nn.Linear(16, 16)  # as torch.ao.quantization makes one out of another
    other.weight, other._forward_pre_hooks = model.fc2.weight, model.fc2._forward_pre_hooks
    with pytest.raises(nm.NMError, match="this Linear took the hooks of a layer .* not its masks"):
        other(torch.randn(2, 16))


def test_a_call_that_is_begun_again_gives_buffers_their_sizes_back() -> None:
    """Observers of quantisation resize theirs in the first call."""

    class Observing(Breaking):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("largest", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.resize(y.detach())
            return y

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def resize(self, y: Tensor) -> None:
            self.calls = len(self.largest) + 1
            self.largest.resize_(self.calls).fill_(y.amax())

    model = live(Observing())
    model(positive())
    assert model.calls == len(model.largest) == 1
