# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Capture: both modes, any batch, keyword inputs, and errors that name the user's line."""

import copy
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from models import MLP, ConvNet, Remembering, dense, example
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.capture.explaining import user_line
from nm_compiler.capture.export import without_cache
from nm_compiler.capture.exported import Exported


def sparse_of(model: nn.Module, *args: Any, **kwargs: Any) -> nm.SparseModule:
    """All combinations live: the compiled model computes what the dense one does."""
    return nm.compile(model, args, kwargs, method=nm.LBC(), include="*")


def test_several_threads_may_compile_and_lower_models_at_once() -> None:
    models = [ConvNet() for _ in range(4)]

    def made(model: nn.Module) -> tuple[nn.Module, nn.Module]:
        frozen = nm.freeze(nm.compile(copy.deepcopy(model), example(model), method=nm.Magnitude())).eval()
        return frozen, nm.lower(frozen, example(model), backend="dense")

    with ThreadPoolExecutor(4) as threads:
        for frozen, lowered in threads.map(made, models):
            torch.testing.assert_close(lowered(example(frozen)), frozen(example(frozen)), rtol=1e-4, atol=1e-5)


def test_an_example_of_batch_one_serves_every_batch() -> None:
    model = ConvNet()
    sparse = sparse_of(model, example(model, batch=1)).eval()
    for batch in (1, 2, 5, 64):
        x = example(model, batch=batch)
        torch.testing.assert_close(sparse(x), dense(model, x))


class Shifted(nn.Module):
    """Its second input is added to what the first becomes, its third to that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: Tensor, shift: Tensor, *, more: list[Tensor]) -> Tensor:
        return self.inner(x).sum(-1, keepdim=True) + 10 * shift + 100 * more[0]


def test_one_tensor_given_for_several_inputs_stands_for_several() -> None:
    model, x, y, z = Shifted(), *torch.randn(3, 4, 8)
    sparse = sparse_of(model, x, x, more=[x]).eval()  # as input_ids=tokens, labels=tokens
    torch.testing.assert_close(sparse(x, y, more=[z]), dense(model, x, y, more=[z]))
    lowered = nm.lower(nm.freeze(sparse, finish=True), (x, x), {"more": [x]}, backend="dense")
    torch.testing.assert_close(lowered(x, y, more=[z]), model(x, y, more=[z]))


VIEWS: dict[str, Callable[[], Tensor]] = {
    "all but the last": lambda: torch.randn(4, 8, 9)[..., :-1],  # as tokens[:, :-1]
    "all but the first": lambda: torch.randn(4, 9, 8)[:, 1:],
    "every second": lambda: torch.randn(8, 8, 8)[::2],
    "the first few": lambda: torch.randn(9, 8, 8)[:4],
    "of an array": lambda: torch.from_numpy(np.zeros((4, 8, 16), np.float32)[..., ::2]),
    "expanded": lambda: torch.randn(8, 8).expand(4, 8, 8),
    "turned": lambda: torch.randn(8, 8, 4).permute(2, 1, 0),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_an_example_that_is_part_of_a_larger_tensor_asks_for_no_such_inputs(view: Callable[[], Tensor]) -> None:
    model = MLP()
    given = view()
    free = torch.export.ShapesCollection()
    free[given] = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    sparse = sparse_of(model, given).eval()
    inputs = [given, view(), torch.randn(4, 8, 8), torch.randn(6, 8, 8), torch.randn(6, 8, 10)[..., 2:], torch.randn(1, 8, 8)]
    for x in inputs:
        torch.testing.assert_close(sparse(x), dense(model, x))
    model = nm.freeze(sparse, finish=True)
    lowered = nm.lower(model, (given,), backend="dense", dynamic_shapes=free)
    for x in (*inputs, torch.randn(3, 5, 8)):
        torch.testing.assert_close(lowered(x), model(x))


class Pair(NamedTuple):
    first: Tensor
    second: dict[str, Tensor]


class Keywords(nn.Module):
    """Positional, keyword, optional and nested inputs; nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: Tensor, extra: dict[str, list[Tensor]] | None = None, *, scale: float = 1.0, flip: bool = False
    ) -> Pair:
        y = self.a(x) * scale
        if extra is not None:
            y = y + extra["more"][0]
        return Pair(self.b(-y if flip else y), {"hidden": y})


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    model = Keywords()
    x = torch.randn(2, 8)
    sparse = sparse_of(model, x, extra={"more": [x]}, scale=0.5)
    x = torch.randn(7, 8)
    out = sparse(x, extra={"more": [x]}, scale=0.5)
    assert isinstance(out, Pair)
    expected = dense(model, x, extra={"more": [x]}, scale=0.5)
    torch.testing.assert_close(out.first, expected.first)
    torch.testing.assert_close(out.second["hidden"], expected.second["hidden"])


class Cache:
    """What a registered pytree may be: no container that keys of its paths index, and its leaves have to be tensors."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.length, self.keys = keys[0].shape[1], keys


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        y = self.b(self.a(x)) + cache.keys[0].sum(1) * cache.keys[1].sum(1)
        return self.c(y), Cache([torch.cat([key, y[:, None]], 1) for key in cache.keys])


def test_a_cache_that_is_a_registered_pytree_goes_in_and_out_of_captured_and_lowered_models() -> None:
    register, forget = torch.utils._pytree.register_pytree_node, torch.utils._pytree._deregister_pytree_node
    entry: Any = torch.utils._pytree.MappingKey("keys")
    with_keys = {"flatten_with_keys_fn": lambda cache: ([(entry, cache.keys)], None)}
    register(Cache, lambda cache: ([cache.keys], None), lambda children, _: Cache(list(*children)), **with_keys)
    try:
        model, x = Cached().eval(), torch.randn(3, 8)
        any_length = {"x": {0: torch.export.Dim.AUTO}, "cache": [[{0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}] * 2]}
        first = Cache([torch.randn(3, 5, 8), torch.randn(3, 5, 8)])
        model = nm.freeze(nm.compile(model, (x, first), method=nm.Magnitude(), dynamic_shapes=any_length)).eval()
        lowered = nm.lower(model, (x, first), backend="dense", dynamic_shapes=any_length)
        wanted, found = (x, first), (x, first)
        for _ in range(2):
            wanted, found = model(*wanted), lowered(*found)
            torch.testing.assert_close(found[0], wanted[0])
        assert found[1].length == 7
        with pytest.raises(nm.NMError, match=r"captured branch holds only while.*cache.*shape") as refused:
            lowered(x, Cache([torch.randn(3, 5, 8), torch.randn(2, 5, 8)]))
        assert "Cache([float32[3, 5, 8], float32[2, 5, 8]])" in str(refused.value)
    finally:
        forget(Cache)


def test_the_same_call_written_with_keywords_or_in_another_order_fits() -> None:
    model = Keywords()
    x = torch.randn(2, 8)
    sparse = sparse_of(model, x, scale=0.5, extra={"more": [x]})
    expected = sparse(x, scale=0.5, extra={"more": [x]}).first
    assert torch.equal(sparse(x, extra={"more": [x]}, scale=0.5).first, expected)
    assert torch.equal(sparse(extra={"more": [x]}, scale=0.5, x=x).first, expected)
    assert torch.equal(sparse(x, {"more": [x]}, scale=0.5).first, expected), "captured by name, given by place"
    assert torch.equal(sparse(x, {"more": [x]}, scale=0.5, flip=False).first, expected), "what it is anyway"


@pytest.mark.parametrize("then", [None, "eager"])
def test_an_input_that_was_not_captured_may_be_given_as_its_default(then: str | None) -> None:
    model, x = Keywords(), torch.randn(2, 8)
    sparse = sparse_of(model, x).eval()
    called = sparse if then is None else torch.compile(sparse, backend=then, fullgraph=True)
    for y in (called(x, None), called(x, extra=None, scale=1.0), called(extra=None, x=x, flip=False)):
        assert torch.equal(y.first, sparse(x).first)
    for given in ({"scale": 1}, {"flip": None}, {"scale": torch.tensor(1.0)}, {"extra": {"more": [x]}}):
        with pytest.raises(nm.NMError, match=f"unexpected {next(iter(given))}"):
            sparse(x, **given)


@pytest.mark.parametrize(
    ("args", "kwargs", "problem"),
    [
        ((torch.randn(2, 9),), {"scale": 0.5}, "x has size 9 on axis 1, where 8 was captured"),
        ((torch.randn(8),), {"scale": 0.5}, "x has 1 axes, 2 were captured"),
        ((torch.ones(2, 8, dtype=torch.int64),), {"scale": 0.5}, "x is torch.int64, floating point was captured"),
        ((3,), {"scale": 0.5}, "x is int, a tensor was captured"),
        ((torch.randn(2, 8),), {"scale": 0.25}, "scale is 0.25, the graph holds for 0.5"),
        ((torch.randn(2, 8),), {}, "missing scale"),
        ((torch.randn(2, 8),), {"scale": 0.5, "flip": True}, "unexpected flip"),
        ((torch.randn(2, 8), None, 0.5), {}, "3 positional inputs, 1 were captured"),
        ((torch.randn(2, 8), {"more": []}), {"scale": 0.5}, "unexpected extra"),
        (([torch.randn(2, 8)],), {"scale": 0.5}, "its structure differs"),
    ],
)
def test_another_signature_is_refused_with_what_was_captured_and_the_dynamo_route(
    args: Any, kwargs: Any, problem: str
) -> None:
    sparse = sparse_of(Keywords(), torch.randn(2, 8), scale=0.5)
    with pytest.raises(nm.NMError) as error:
        sparse(*args, **kwargs)
    assert problem in str(error.value)
    assert "captured: (x: [any, 8], scale: 0.5)" in str(error.value)
    assert "TorchDynamo route: nm.compile(model) without example inputs" in str(error.value)


class Filling(nn.Module):
    """Makes a tensor whose dtype is that of a number it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor, value: Any) -> tuple[Tensor, Tensor]:
        return self.mlp(x), torch.full((2,), value)


def test_a_constant_that_is_equal_and_of_another_kind_is_not_the_captured_one() -> None:
    x, model = torch.randn(2, 8), nm.freeze(nm.compile(Filling(), (torch.randn(2, 8), 1), method=nm.Magnitude()))
    sparse, lowered = nm.compile(Filling(), (x, 1), method=nm.SRSTE()), nm.lower(model.eval(), (x, 1), backend="dense")
    for each in (sparse, torch.compile(sparse, backend="eager"), lowered):
        assert each(x, 1)[1].dtype == each(x, np.int64(1))[1].dtype == torch.int64
        for other in (1.0, True):
            with pytest.raises(nm.NMError, match=f"value is {other}, the graph holds for 1"):
                each(x, other)


def test_the_users_dynamic_shapes_are_passed_through() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)).mean(1))

    model = Sequence()
    auto = torch.export.Dim.AUTO
    sparse = nm.compile(model, torch.randn(3, 5, 8), method=nm.LBC(), dynamic_shapes=({0: auto, 1: auto},), include="*")
    x = torch.randn(2, 11, 8)
    torch.testing.assert_close(sparse(x), dense(model, x))
    fixed = nm.compile(Sequence(), torch.randn(3, 5, 8), method=nm.LBC(), include="*")
    with pytest.raises(nm.NMError, match=r"size 11 on axis 1, where 5 was captured[\s\S]*dynamic_shapes="):
        fixed(x)


def test_control_flow_on_shapes_is_captured_and_the_other_branch_refused_rather_than_run_wrongly() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return y * 2 if x.shape[0] > 10 else y

    model = Branch()
    sparse = sparse_of(model, torch.randn(4, 8))
    for batch in (1, 10):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(sparse(x), dense(model, x))
    with pytest.raises(nm.NMError, match="size 11 on axis 0, and the captured branch holds for 0 to 10"):
        sparse(torch.randn(11, 8))


def test_a_batch_that_python_asks_the_length_of_stays_free() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.token = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            assert len(x) > 0
            y = torch.cat([self.token.expand(len(x), -1, -1), self.stem(x)], 1)
            return self.fc(y).view(len(x), -1) / len(x)

    model, x = Rows(), torch.randn(4, 3, 8)
    plain = copy.deepcopy(model)
    sparse = nm.compile(model, (x,), method=nm.Magnitude(), include=["fc*"])
    lowered = nm.lower(nm.freeze(sparse).eval(), (x,), backend="dense")
    with torch.no_grad():
        plain.fc.weight.copy_(model.fc.weight)
    for batch in (1, 4, 7):
        given = torch.randn(batch, 3, 8)
        torch.testing.assert_close(lowered(given), plain(given))
    assert len([1, 2]) == 2
    assert len.__module__ == "builtins", "as it was"


def test_a_batch_of_one_is_refused_where_the_models_python_treats_it_by_itself() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] == 1 or x.shape[0] < 1:  # the same for every batch
                return x
            y = self.layers(x) + torch.ones(1, 8)  # and that torch broadcasts is no branch of the model's
            return y[0] if x.shape[0] == 1 else y

    model, one = Alone(), torch.randn(1, 8)
    sparse = copy.deepcopy(sparse_of(model, one))
    for batch in (2, 5):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(sparse(x), dense(sparse.origin, x))
    with pytest.raises(
        nm.NMError, match=r"x has size 1 on axis 0, for which forward\(\) takes another[\s\S]*such as \(\{\},\)"
    ):
        sparse(one)
    fixed = nm.compile(Alone(), (one,), method=nm.LBC(), include="*", dynamic_shapes=({},))
    assert fixed(one).shape == (8,)


@pytest.mark.parametrize("inputs", [(torch.randn(2, 7),), (torch.randn(2, 8), 3), (), (None,)])
def test_example_inputs_that_do_not_fit_are_an_error_with_their_shapes(inputs: Any) -> None:
    model = MLP()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(nm.NMError, match="could not be captured in evaluation mode with inputs"):
        nm.compile(model, inputs)
    assert model.state_dict().keys() == before.keys()
    assert model.training


def test_an_assertion_in_a_layer_that_does_not_hold_is_an_error_with_its_line() -> None:
    class Whole(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[1] % 7 == 0, "")  # as timm writes them
            return super().forward(x)

    with pytest.raises(nm.NMError, match=r"AssertionError\n  at .*test_capture.py:\d+ in forward: torch._assert\(x.shape"):
        nm.compile(nn.Sequential(nn.Linear(8, 8), Whole(8, 8)), torch.randn(2, 8))


def test_the_models_mode_statistics_and_random_state_survive_capture() -> None:
    model = ConvNet(dropout=0.5)
    model.norm1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    nm.compile(model, example(model), method=nm.SRSTE())
    assert model.training
    assert not model.norm1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("called", [False, True])
def test_what_a_model_keeps_of_its_weights_in_evaluation_mode_is_no_constant_of_the_graph_and_left_alone(called: bool) -> None:
    model, x = Remembering().eval(), torch.randn(4, 8)
    if called:
        with torch.no_grad():
            model(x)
    kept = dict(model.kept)
    sparse = sparse_of(model, x)
    assert model.kept == kept
    assert not model.training
    with torch.no_grad():
        model.bias.add_(1)
    trained = Remembering()
    trained.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(sparse.eval()(x), trained.eval()(x))


def test_a_cache_is_not_asked_for_unless_the_user_does() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, use_cache: bool = True) -> tuple[Tensor, Any]:
            y = self.b(self.a(x))
            return y, (object() if use_cache else None)  # export could not return the object

    model = Cached()
    sparse = sparse_of(model, torch.randn(2, 8))
    assert sparse(torch.randn(3, 8))[1] is None
    auto = torch.export.Dim.AUTO
    for shapes in ({"x": {0: auto, 1: auto}}, ({0: auto, 1: auto},)):  # they need not know of use_cache
        free = nm.compile(Cached(), torch.randn(2, 3, 8), dynamic_shapes=shapes, include="*")
        assert free(torch.randn(4, 5, 8))[0].shape == (4, 5, 8)
    named = nm.compile(Cached(), kwargs={"x": torch.randn(2, 3, 8)}, dynamic_shapes={"x": {1: auto}}, include="*")
    assert named(x=torch.randn(2, 5, 8))[0].shape == (2, 5, 8)


def test_plain_tensor_attributes_of_the_root_are_constants_of_the_graph() -> None:
    class Scaled(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.tensor(2.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    model = Scaled()
    x = torch.randn(3, 8)
    torch.testing.assert_close(sparse_of(model, x)(x), dense(model, x))


class Batched(nn.Module):
    """A wrapper that takes whatever a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, **batch: Tensor) -> Tensor:
        return self.inner(batch["x"] + batch["shift"])


def test_keywords_that_forward_does_not_name_are_dynamic_too_and_the_model_stays_as_it_was() -> None:
    model = Batched().eval()
    batches = [{"x": torch.randn(n, 8), "shift": torch.randn(n, 8)} for n in (2, 5)]
    assert set(nm.calibrate(model, batches)) == {f"inner.fc{i}.weight" for i in (1, 2, 3)}
    sparse = nm.compile(model, kwargs=batches[0], method=nm.LBC(), include="*").eval()
    assert "nm.score_weight" in nm.show(sparse)
    torch.testing.assert_close(sparse(**batches[1]), dense(model, **batches[1]))
    assert "forward" not in model.__dict__
    with pytest.raises(nm.NMError, match="shift has size 7 on axis 1|captured branch holds only while"):
        sparse(x=batches[1]["x"], shift=torch.randn(5, 7))


def test_inputs_of_different_batches_and_inputs_behind_a_star_are_captured() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, *xs: Tensor) -> Tensor:
            return self.b(self.a(xs[0] + xs[1]))

    model = Positions()
    sparse = sparse_of(model, torch.randn(1, 8), torch.randn(4, 8))
    for batch in (1, 4, 6):
        inputs = (torch.randn(1, 8), torch.randn(batch, 8))
        torch.testing.assert_close(sparse(*inputs), dense(model, *inputs))


def test_compiling_under_inference_mode_leaves_a_model_that_trains() -> None:
    model = MLP()
    with torch.inference_mode():
        sparse = nm.compile(model, torch.randn(2, 8), method=nm.BiMask(interval=1, moves=40))
    sparse(torch.randn(2, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = sparse.weights[0]["order"].clone()
    nm.SparsityScheduler(sparse, total_steps=1).step()
    assert not torch.equal(sparse.weights[0]["order"], before)
    assert not any(value.is_inference() for value in sparse.state_dict().values())


def test_a_model_that_rewrites_its_weights_in_train_and_eval_is_left_as_it_was() -> None:
    class Merging(MLP):
        merged = False

        def train(self, mode: bool = True) -> "Merging":
            if mode == self.merged:
                self.fc2.weight.data += -1.0 if mode else 1.0
                self.merged = not mode
            return super().train(mode)

    model = Merging().eval()
    before = model.fc2.weight.detach().clone()
    nm.compile(model, torch.randn(2, 8), method=nm.SRSTE())
    assert model.merged
    assert not model.training
    torch.testing.assert_close(model.fc2.weight.detach(), before)


def test_constants_made_inside_a_submodule_stay_out_of_the_users_modules() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])

    model = nn.Sequential(nn.Sequential(Inner()), Inner())
    sparse = sparse_of(model, torch.randn(2, 8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(sparse(x), dense(model, x))
    assert not any("lifted" in name for module in model.modules() for name in vars(module))


def test_constants_made_in_forward_and_frozen_parameters_are_no_obstacle() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.a.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]) + torch.arange(8, device=x.device)
            return self.b(y.to(torch.float32))

    model = Constants()
    sparse = sparse_of(model, torch.randn(2, 8))
    x = torch.randn(3, 8)
    sparse(x).sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None
    torch.testing.assert_close(sparse(x), dense(model, x))


def test_outputs_that_no_pytree_knows_are_carried_in_fragments() -> None:
    @dataclass
    class Result:
        out: Tensor
        hidden: Tensor

    class Returning(MLP):
        def forward(self, x: Tensor) -> Any:
            hidden = torch.relu(self.fc1(x))
            return Result(self.fc3(torch.relu(self.fc2(hidden))), hidden)

    model = Returning()
    sparse = nm.compile(model, torch.randn(2, 8), method=nm.LBC())
    x = torch.randn(5, 8)
    for mode in (True, False):
        found, expected = sparse.train(mode)(x), dense(model, x)
        assert isinstance(found, Result)
        torch.testing.assert_close(found.out, expected.out)
        torch.testing.assert_close(found.hidden, expected.hidden)
    assert {site.name for site in sparse.plan.sites} == {"fc2.weight"}


class Several(nn.Module):
    """Gives a dict that has a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP()

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {"y": y, "both": [y, (y + 1, y + 2)]}


def test_a_model_that_is_an_fx_graph_gives_dicts_and_lists_that_can_be_changed_as_it_does_itself() -> None:
    x = torch.randn(2, 8)
    model = torch.fx.symbolic_trace(Several())
    sparse = nm.compile(model, (x,), method=nm.Magnitude())
    frozen = nm.freeze(copy.deepcopy(sparse))
    for each in (sparse, nm.lower(frozen, (x,), backend="dense")):
        found = each(x)
        assert type(found) is dict
        assert type(found["both"]) is list
        found["both"].append(x)
        torch.testing.assert_close({**found, "both": found["both"][:2]}, frozen(x))


def test_the_users_line_may_lie_in_a_library_whose_name_begins_like_torchs() -> None:
    frames = [
        traceback.FrameSummary(f"{Path(torch.__file__).parent}{rest}", 7, "forward") for rest in ("vision/ops.py", "/nn.py")
    ]
    assert "torchvision/ops.py:7 in forward" in user_line(frames)  # not torch/nn.py


class Watching(MLP):
    """Hooks itself at its first call, as Hugging Face's models do to give hidden states."""

    hooked = False

    def forward(self, x: Tensor) -> Any:
        if not self.hooked:
            self.fc1.register_forward_hook(lambda *call: self.seen.append(call[-1]))
            self.hooked = True
        self.seen: list[Tensor] = []
        y = super().forward(x)
        return (y, *self.seen)


@pytest.mark.parametrize("what", ["compile", "permute", "calibrate"])
def test_hooks_that_a_model_gives_itself_at_its_first_call_are_there_once_afterwards(what: str) -> None:
    model: Any = Watching()
    x = torch.randn(4, 8)
    expected = len(Watching()(x))
    if what == "compile":
        sparse = nm.compile(model, (x,), method=nm.Magnitude())
        assert len(sparse(x)) == expected
        model = nm.freeze(sparse)
    elif what == "permute":
        nm.permute(model, (x,))
    else:
        nm.calibrate(model, [(x,)])
    assert len(model(x)) == len(model(x)) == expected


class Answering(MLP):
    """Made of parts, as Hugging Face's models of images and text are: ``use_cache`` goes on to one of them, unnamed."""

    def __init__(self, caches: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(use_cache=caches))

    def can_generate(self) -> bool:
        return True

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        y = super().forward(x)
        return (y, Unknown(y)) if kwargs.get("use_cache", self.config.get_text_config().use_cache) else (y,)


class Unknown:
    """What no pytree knows."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_a_cache_of_a_part_that_no_parameter_names_is_not_asked_for() -> None:
    model, x = Answering(), torch.randn(2, 8)
    sparse = sparse_of(model, x)
    assert all(isinstance(route, Exported) for route in sparse.routes.values())
    torch.testing.assert_close(sparse(x)[0], dense(model, x)[0])
    assert without_cache(model, {"use_cache": True}) == {}
    assert without_cache(Answering(caches=False), {}) == {}
    lowered = nm.lower(nm.freeze(sparse, finish=True), (x,), backend="dense")
    assert len(lowered(x)) == 1


class Chunked(MLP):
    """Its inputs have no names, and what is captured holds for as many rows as make three chunks."""

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat([super(Chunked, self).forward(part) for part in sum(xs).split(2)])


@pytest.mark.parametrize("count", [1, 2])
def test_conditions_on_inputs_without_a_name_are_looked_at_and_hold_for_the_example(count: int) -> None:
    model = Chunked()
    sparse = nm.compile(model, tuple(torch.randn(6, 8) for _ in range(count)), method=nm.SRSTE())
    assert sparse(*(torch.randn(6, 8) for _ in range(count))).shape == (6, 4)
    with pytest.raises(nm.NMError, match=r"the captured branch holds only while .*xs\[0\]\.shape\[0\]"):
        sparse(*(torch.randn(8, 8) for _ in range(count)))  # it left out the last chunk
