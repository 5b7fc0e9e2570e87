"""The copy that nm.lower_parts returns: what it shares with the model, and what cannot be copied."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import types
import weakref
from typing import Any

import pytest
import torch
from test_lower_parts import WIDTH, Block, sparse
from torch import Tensor, nn

import nm_compiler as nm

X = torch.randn(2, 3, WIDTH)


def pair() -> Any:
    """Blocks that are called one after the other, of which ``up`` is a part."""
    torch.manual_seed(0)
    return sparse(nn.Sequential(Block(), Block()))


def ups(model: nn.Module, run: Any = None) -> Any:
    return nm.lower_parts(model, "*.up", run or (lambda model: model(X)), backend="cpu", force=["*"])


def _of_a_function(block: Any) -> None:
    block.forward = lambda x: block.down(torch.relu(block.up(x)))


def _of_a_partial(block: Any) -> None:
    block.forward = functools.partial(lambda forward, x: forward(x), lambda x: block.down(block.up(x)))


def _of_a_compiler(block: Any) -> None:
    block.forward = torch.compile(block.forward, backend="eager")


def _of_a_hook(block: Any) -> None:
    block.register_forward_hook(lambda module, args, output: output + block.down(block.up(args[0])))


def _of_a_list(block: Any) -> None:
    block.steps = [lambda x: block.up(x)]


@pytest.mark.parametrize("wrap", [_of_a_function, _of_a_partial, _of_a_compiler, _of_a_hook, _of_a_list])
def test_a_function_that_would_run_the_model_in_the_place_of_the_copy_is_an_error_that_names_it(wrap: Any) -> None:
    model = pair()
    wrap(model[1])
    with pytest.raises(nm.NMError, match=r"^1\.\w+ in the copy that nm.lower_parts returns would run 1(\.\w+)? of the model"):
        ups(model)


def test_methods_and_partials_of_modules_go_with_the_copy() -> None:
    model = pair()
    block, wrapped = model[0], model[1]

    def own(self: Any, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.down(self.up(x))
        return y

    def around(module: Any, x: Tensor) -> Any:
        return module.before(x) + 1

    block.forward = types.MethodType(own, block)
    wrapped.before = wrapped.forward  # as accelerate wraps forward
    wrapped.forward = functools.update_wrapper(functools.partial(around, wrapped), wrapped.before)
    block.beside = weakref.ref(wrapped.up)
    fast, called = ups(model), list[Any]()
    torch.testing.assert_close(fast(X), model(X))
    assert fast[0].beside() is fast[1].up
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: called.append(module))
    fast(X)
    assert not called


class Counting(Block):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("parts", ["*.up", "0"])
def test_buffers_are_the_copys_own_inside_parts_and_outside(parts: str) -> None:
    model = sparse(nn.Sequential(Counting()))
    fast = nm.lower_parts(model, parts, lambda model: model(X), backend="cpu", force=["*"])
    fast(X)
    fast(X)
    assert float(model[0].calls) == 0.0
    assert [float(value) for name, value in fast.named_buffers() if name.endswith("calls")] == [2.0]


def test_of_parts_in_parts_lowered_one_after_the_other_packed_weights_are_shared() -> None:
    first = ups(pair())
    second = nm.lower_parts(first, "*.down", lambda model: model(X), backend="cpu", force=["*"])
    ours, theirs = dict(first.named_buffers()), dict(second.named_buffers())
    assert ours["0.up.run.weight_values"].data_ptr() == theirs["0.up.run.weight_values"].data_ptr()
    torch.testing.assert_close(second(X), first(X))


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_to_and_its_like_change_the_copy_alone_and_all_of_it_or_nothing(backend: str) -> None:
    model = pair()
    one = nm.lower_parts(model, "1.up", lambda model: model(X), backend=backend)
    for fast in (copy.deepcopy(one), one):
        refused = pytest.raises(
            nm.NMError, match="1.up, a lowered part .* is packed for float32 on cpu: for float64 on cpu, cast"
        )
        with refused if backend == "cpu" else contextlib.nullcontext():
            fast.double()
        dtype = torch.float32 if backend == "cpu" else torch.float64
        assert {each.dtype for each in (*fast.parameters(), *fast[1].up.buffers()) if each.is_floating_point()} == {dtype}
        torch.testing.assert_close(fast(X.to(dtype)).to(X.dtype), model(X))
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    fast = ups(model)
    assert fast.to(torch.float32) is fast
    with torch.no_grad():
        fast[0].down.weight.zero_()
    assert not model[0].down.weight.any()


class Marked(nn.Parameter):
    """A class of its own."""

    rank: int


def test_parameters_keep_their_class_their_attributes_and_whether_they_train() -> None:
    model = pair()
    marked = Marked(model[0].down.weight.detach(), requires_grad=False)
    marked.rank, model[0].down.weight = 3, marked
    with torch.inference_mode():
        model[1].extra = nn.Parameter(torch.ones(2))
    fast = ups(model)
    assert type(fast[0].down.weight) is Marked
    assert fast[0].down.weight.rank == 3
    assert not fast[0].down.weight.requires_grad
    assert fast[0].down.weight is not marked
    assert fast[1].extra.is_inference()


@pytest.mark.parametrize(("make", "match"), [
    (threading.Lock, r"1\.kept of this Sequential is a lock that cannot be copied"),
    (lambda: [torch.ones(2, requires_grad=True) * 2], r"1\.kept of this Sequential is a list that cannot be copied"),
], ids=["a lock", "activations"])  # fmt: skip
def test_what_cannot_be_copied_is_named_before_anything_is_run(make: Any, match: str) -> None:
    model, ran = pair(), list[int]()
    model[1].kept = make()
    with pytest.raises(nm.NMError, match=match):
        ups(model, lambda model: ran.append(1))
    assert not ran


def test_a_weight_that_is_computed_at_every_call_and_an_activation_that_is_kept_are_copied() -> None:
    model = pair()
    nn.utils.weight_norm(model[0].down)
    model[1].kept = model(X)
    fast = ups(model)
    torch.testing.assert_close(fast(X), model(X))
    assert torch.equal(fast[1].kept, model[1].kept)


def test_hooks_of_a_part_are_called_around_it_and_see_what_they_keep() -> None:
    model, seen = pair(), list[Tensor]()
    up: Any = model[0].up
    up.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    up.register_forward_hook(lambda module, args, output: seen.append(output))
    up.register_forward_hook(lambda module, args, kwargs, output: output * 2, with_kwargs=True)
    fast = ups(model)
    seen.clear()
    torch.testing.assert_close(fast(X), model(X))
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    assert len(up._forward_hooks) == 2
    assert nm.report(fast).notes[-1].startswith("Of one part")


class Recorder(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen = list[Tensor]()

    def record(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


def test_hooks_that_are_methods_belong_to_the_copy_and_those_that_close_over_layers_are_an_error() -> None:
    model = sparse(nn.Sequential(Recorder(), Block()))
    model[1].up.register_forward_hook(model[0].record)
    fast = ups(model)
    fast(X)
    assert (len(model[0].seen), len(fast[0].seen)) == (0, 1)
    model[1].up.register_forward_hook(lambda module, args, output: model[0].up(args[0]))
    with pytest.raises(nm.NMError, match=r"1\.up\._forward_hooks in the copy .* would run the model"):
        ups(model)


def test_hooks_inside_a_part_are_in_its_graph_and_the_report_says_so() -> None:
    model = pair()
    model[0].up.register_forward_hook(lambda module, args, output: output * 2)
    nn.utils.weight_norm(model[1].up)
    fast = nm.lower_parts(model, ["0", "1"], lambda model: model(X), backend="cpu", force=["*"])
    torch.testing.assert_close(fast(X), model(X))
    assert "Forward hooks of 0.up: what they compute is in the graph, which does not call them again." in nm.report(fast).notes


def test_hooks_that_a_model_gives_its_parts_while_it_is_used_are_on_the_copys() -> None:
    model, seen = pair(), list[Tensor]()

    def run(model: Any) -> None:
        model[0].up.register_forward_hook(lambda module, args, output: seen.append(output))
        model(X)

    fast = ups(model, run)
    seen.clear()
    fast(X)
    assert len(seen) == 1
    assert not model[0].up._forward_hooks


class Pretrained(nn.Sequential):
    def save_pretrained(self, folder: str) -> None:
        raise AssertionError(folder)


def test_files_that_from_pretrained_would_fill_with_chance_are_not_written() -> None:
    fast = ups(sparse(Pretrained(Block())))
    with pytest.raises(nm.NMError, match=r"save_pretrained\(\) of a model with lowered parts .* torch.save\(model, path\)"):
        fast.save_pretrained("here")
