# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""torch.compile(model, backend="nm_compiler"): options, methods without state, and what does not go together."""

import copy
import gc
import logging
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from models import MLP, Breaking, ConvNet, example
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.backend import nm_compiler
from nm_compiler.solvers.masks import masked


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False, suppress_errors=False):
        yield


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=nm_compiler, options={"then": "eager", **options})


def test_torch_finds_the_backend_by_its_name() -> None:
    known = {entry.name: entry for entry in entry_points(group="torch_dynamo_backends")}
    if "nm_compiler" not in known:
        pytest.skip("installed before the entry point was there: make installs it again")
    assert known["nm_compiler"].load() is nm_compiler
    model = MLP()
    loss = torch.compile(model, backend="nm_compiler", options={"then": "aot_eager"})(example(model)).sum()
    loss.backward()
    assert [row.status for row in nm.report(model).rows] == ["dense", "sparse", "dense"]


@pytest.mark.ci(here=["eager"])
@pytest.mark.parametrize("then", ["eager", "aot_eager", "inductor"])
def test_models_of_one_class_that_are_compiled_by_name_are_sparse_each_with_weights_of_its_own(then: str) -> None:
    x = example(MLP())

    def check(model: nn.Module) -> None:
        found = compiled(model, then=then)(x)
        twin = MLP()
        twin.load_state_dict(model.state_dict())
        dense = twin(x)
        with torch.no_grad():
            twin.fc2.weight.copy_(masked(twin.fc2.weight, pattern=nm.Pattern(2, 4), axis=1))
        torch.testing.assert_close(found, twin(x))
        assert not torch.allclose(found, dense)
        assert [row.status for row in nm.report(model).rows] == ["dense", "sparse", "dense"]

    first, second = MLP(), MLP()
    for model in (first, second, first):
        check(model)
    compiled(second, then=then)(x).sum().backward()
    assert second.fc2.weight.grad is not None
    del first, model
    gc.collect()
    third = MLP()
    check(third)
    nm.freeze(second)
    check(MLP())
    check(third)


def test_a_copy_of_a_model_that_was_compiled_by_name_is_compiled_by_itself() -> None:
    model = MLP()
    x = example(model)
    wanted = compiled(model)(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(compiled(twin)(x), wanted)
    with torch.no_grad():
        twin.fc2.weight.zero_()
    assert not torch.equal(compiled(twin)(x), wanted)
    torch.testing.assert_close(compiled(model)(x), wanted)


def test_a_bare_compile_is_bi_mask_2_4_and_leaves_the_state_dict_alone() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    keys = list(model.state_dict())
    fast = compiled(model, then="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        fast(example(model)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert list(model.state_dict()) == keys
    report = nm.report(fast)
    assert report.title.startswith("ConvNet with BiMask(")
    assert [row.name for row in report.rows if row.status == "sparse"] == ["conv1.weight", "conv2.weight"]
    assert all(row.runs == 3 and row.backward_kept for row in report.rows if row.status == "sparse")
    with torch.no_grad():
        expected = fast.eval()(example(model))
    frozen = nm.freeze(fast)
    assert frozen is model
    assert 1 in nm.verify(frozen).satisfied["conv1.weight"]
    torch.testing.assert_close(frozen(example(model)), expected)


def test_options_choose_pattern_method_and_weights() -> None:
    model = MLP()
    fast = compiled(model, pattern={"fc2*": "1:4", "*": "2:4"}, method="sr-ste", include=["fc1*"], exclude="fc3*")
    fast(example(model))
    rows = {row.name: (row.pattern, row.reason) for row in nm.report(model).rows}
    assert rows["fc1.weight"][0] == "2:4"
    assert rows["fc2.weight"][0] == "1:4"
    assert rows["fc3.weight"] == (None, "excluded by 'fc3*'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patern": "2:4"}, "backend 'nm_compiler' knows pattern, method, include, exclude, then"),
        ({"then": "tensorrt"}, "then='tensorrt': what runs the rewritten graph is one of 'inductor', 'aot_eager', 'eager'"),
        ({"method": "lottery"}, "method='lottery': choose one of BiMask, Gradual, LBC"),
        ({"method": nm.LBC}, r"did you mean nm.LBC\(\)"),
        ({"pattern": "4:2"}, "4:2"),
        ({"method": nm.LBC()}, r"LBC keeps state .*\(scores, live\)[\s\S]*nm.compile\(model, method=nm.LBC\(\)\)"),
        ({"method": "magnitude"}, r"Magnitude keeps state .*\(mask\)"),
    ],
    ids=["unknown", "then", "no_method", "class", "pattern", "lbc", "magnitude"],
)
def test_wrong_options_and_methods_with_state_are_errors_with_the_way_out(options: Any, message: str) -> None:
    model = MLP()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as error:
        compiled(model, **options)(example(model))
    assert isinstance(error.value.inner_exception, nm.NMError)
    assert nm.report(model).totals["sparse"] == 0  # nothing was prepared


def test_modes_are_refused() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="has no modes"):
        torch.compile(MLP(), backend=nm_compiler, mode="max-autotune")(torch.randn(2, 8))


def test_errors_that_dynamo_would_suppress_are_raised_and_the_switch_is_off() -> None:
    model = MLP()
    torch._dynamo.config.suppress_errors = True
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="suppress_errors was on"):
        compiled(model)(example(model))
    assert not torch._dynamo.config.suppress_errors
    compiled(model)(example(model))


def test_past_the_recompile_limit_a_bare_compile_raises() -> None:
    class Named(MLP):
        def forward(self, x: Tensor, name: str = "a") -> Tensor:
            return super().forward(x) + len(name) if name != "b" else super().forward(x)

    fast = compiled(Named())
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        _ = [fast(torch.randn(2, 8), name) for name in "abcdef"]


def test_a_bare_compile_in_several_fragments_warns_that_python_is_not_seen(caplog: Any) -> None:
    model = Breaking()
    with caplog.at_level(logging.WARNING, "nm_compiler"):
        compiled(model)(example(model))
    assert [record for record in caplog.records if "several fragments" in record.getMessage()]
    assert [row.status for row in nm.report(model).rows] == ["dense", "sparse", "dense"]


def test_options_of_a_compile_around_have_to_agree_with_the_prepared_model() -> None:
    model = nm.compile(MLP(), method=nm.LBC(), then="eager")
    compiled(model, method=nm.LBC(), pattern="2:4")(example(model)).sum().backward()
    assert model.fc2.weight_scores.grad is not None
    for options, message in (({"method": nm.SRSTE()}, "method=SRSTE"), ({"pattern": "1:4"}, "pattern=1:4")):
        with pytest.raises(nm.NMError, match=message + r"[\s\S]*prepared with"):
            compiled(model, **options)(example(model))


@pytest.mark.parametrize("backend", ["eager", nm_compiler], ids=["other", "own"])
def test_compile_in_place_of_a_prepared_model_is_refused_and_leaves_it_as_it_was(backend: Any) -> None:
    model = nm.compile(MLP(), method=nm.LBC(), then="eager")
    expected = model(example(model))
    model.compile(backend=backend)
    with pytest.raises(nm.NMError, match="was prepared by nm.compile, and compile"):
        model(example(model))
    torch.testing.assert_close(model(example(model)), expected)


def test_a_graph_that_is_sparse_already_is_refused() -> None:
    model = MLP()
    sparse = nm.compile(model, example(model))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="compiled by nm.compile already"):
        compiled(sparse)(example(model))


def test_preparing_twice_and_what_needs_a_graph_is_refused_and_the_model_unchanged() -> None:
    model = MLP()
    for options, message in (
        ({"permute": "search"}, "permute='search' needs a graph"),
        ({"method": nm.BiMask(fold=True)}, "which needs a graph"),
        ({"then": "onnx"}, "then='onnx'"),
        ({"exclude": "*"}, "no weight of this MLP can be"),
        ({"include": "nope*"}, "include='nope.*' matches no weight"),
    ):
        with pytest.raises(nm.NMError, match=message):
            nm.compile(model, **options)
    assert list(model.state_dict()) == list(MLP().state_dict())
    live = nm.compile(model, then="eager")
    for again in (live, nn.Sequential(live)):
        with pytest.raises(nm.NMError, match="compiled already"):
            nm.compile(again)
    with pytest.raises(nm.NMError, match="then='eager' is for"):
        nm.compile(MLP(), torch.randn(2, 8), then="eager")


def test_a_function_around_an_unprepared_model_is_refused_and_around_a_prepared_one_is_fine() -> None:
    model = MLP()
    step = torch.compile(lambda x: model(x) * 2, backend=nm_compiler, options={"then": "eager"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="compiles modules, and this is a function"):
        step(example(model))
    nm.compile(model, method=nm.SRSTE(), then="eager")
    torch._dynamo.reset()
    torch.testing.assert_close(step(example(model)), 2 * model(example(model)))
    assert nm.report(model).rows[1].runs == 2
