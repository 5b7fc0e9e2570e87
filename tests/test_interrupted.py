"""Ctrl-C in the middle: what was begun has changed nothing, or all of it is there."""

import itertools
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, example
from torch import Tensor, nn

import nm_compiler as nm

OURS = tuple(str(Path(str(nm.__file__)).parent.parent / folder) for folder in ("nm_compiler", "passes", "runtime"))


def interrupted_at(line: int, call: Callable[[], Any]) -> None:
    """Run ``call`` and raise KeyboardInterrupt where the package comes to its ``line``-th line, counted as they run."""
    passed = itertools.count(1)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event in ("line", "return") and next(passed) == line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)


def looks(model: nn.Module) -> dict[str, Any]:
    """What a user could find changed in a model: values, what is registered, hooks and other attributes of its layers."""
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            found[f"{path}.{key}"] = len(value) if "hooks" in key and isinstance(value, dict) else type(value)
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key] for key, value in one.items()
    )


@pytest.mark.parametrize("live", [pytest.param(False, id="captured"), pytest.param(True, id="live")])
@pytest.mark.parametrize("method", [nm.LBC(), nm.SSTE()], ids=lambda method: method.name)
def test_a_freeze_that_is_interrupted_anywhere_has_changed_nothing_or_all(method: nm.Method, live: bool) -> None:
    model = MLP()
    x = example(model)
    sparse: Any = nm.compile(model, method=method, then="eager") if live else nm.compile(model, x, method=method)
    sparse(x)
    expected = nm.freeze(deepcopy(sparse), finish=True).state_dict()
    before, y = looks(model), sparse(x)
    for line in itertools.count(1, 97):
        try:
            interrupted_at(line, lambda: nm.freeze(sparse, finish=True))
            break
        except KeyboardInterrupt:
            if not hasattr(model, "nm_recipe"):
                break
            assert same(looks(model), before)
            torch.testing.assert_close(sparse(x), y, rtol=0, atol=0)
    assert line > 500
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert "fc2.weight" in nm.verify(model, "2:4").satisfied
    model(x).sum().backward()
    assert sparse is model or sparse.frozen


@pytest.mark.parametrize("where", ["nm_compiler.state.attaching.mark", "nm_compiler.module.watch"])
def test_a_compile_that_is_interrupted_leaves_the_model_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP()
    before, x = looks(model), example(model)
    with monkeypatch.context() as patch:
        interrupted_behind(where, patch)
        with pytest.raises(KeyboardInterrupt):
            nm.compile(model, x, method=nm.LBC(), permute="random")
    assert same(looks(model), before)
    nm.compile(model, x, method=nm.LBC())


@pytest.mark.parametrize("where", ["nm_compiler.state.attaching.mark", "nm_compiler.live.prepared.install"])
def test_a_compile_without_inputs_that_is_interrupted_leaves_the_model_as_it_was(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MLP()
    before = looks(model)
    with monkeypatch.context() as patch:
        interrupted_behind(where, patch)
        with pytest.raises(KeyboardInterrupt):
            nm.compile(model, method=nm.LBC(), then="eager")
    assert same(looks(model), before)
    nm.compile(model, method=nm.LBC(), then="eager")(example(model))


@pytest.mark.parametrize("where", ["nm_compiler.passes.permute._write", "nm_compiler.permuting._retained"])
def test_a_permutation_that_is_interrupted_leaves_all_weights_where_they_were(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ConvNet()
    before = looks(model)
    for after in (1, 2):
        with monkeypatch.context() as patch:
            interrupted_behind(where, patch, after)
            with pytest.raises(KeyboardInterrupt):
                nm.permute(model, example(model), order="random")
        assert same(looks(model), before)


def interrupted_behind(where: str, patch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Let a function do what it does and then, the ``times``-th time, be interrupted before it returns."""
    module, _, name = where.rpartition(".")
    own, calls = getattr(sys.modules[module], name), itertools.count(1)

    def broken(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        if next(calls) == times:
            raise KeyboardInterrupt
        return result

    patch.setattr(sys.modules[module], name, broken)
