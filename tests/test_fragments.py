# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The second way: models that export cannot take run as TorchDynamo fragments, rewritten by the same passes."""

import copy
import io
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from awkward import AWKWARD
from models import Branching, dense, steps
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import nm_compiler as nm
from nm_compiler.capture.exported import Exported
from nm_compiler.fragments.aten import _check_nothing_lost
from nm_compiler.fragments.dynamo import Fragments
from nm_compiler.sites.plan import UNREAD
from nm_compiler.solvers.magnitude import magnitude_mask

METHODS = [nm.LBC(), nm.BiMask(interval=2, moves=40), nm.Magnitude()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m).split(", decay")[0])


def positive(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, 8, dtype=dtype) + 0.1


def branching(method: Any = None, **options: Any) -> tuple[nm.SparseModule, Any]:
    model = Branching()
    return nm.compile(model, positive(), method=method or nm.SRSTE(), **options), model


def masked_call(sparse: nm.SparseModule, *args: Any, **kwargs: Any) -> Any:
    """The original model with its planned weights replaced by what they are multiplied with now."""
    values = {site.name: sparse.masked(site.name)[0].detach() for site in sparse.plan.sites}
    return functional_call(sparse.origin, values, args, kwargs)


def train(sparse: nn.Module, count: int, scheduler: Any = None) -> None:
    steps(sparse, count, positive(), scheduler)


def test_control_flow_on_data_is_carried_in_fragments_and_both_branches_are_sparse() -> None:
    sparse, _ = branching(include=["down.weight"])
    sparse.eval()
    assert all(isinstance(route, Fragments) for route in sparse.routes.values())
    assert {site.name for site in sparse.plan.sites} == {"up.weight", "last.weight"}
    x = positive()
    torch.testing.assert_close(sparse(x), masked_call(sparse, x))
    assert not torch.allclose(sparse(x), dense(sparse.origin, x))


@pytest.mark.ci
def test_a_hook_that_fragments_would_not_call_is_an_error_until_it_is_taken_off() -> None:
    sparse, model = branching()
    sparse.eval()
    expected = sparse(x := positive())
    handle = model.up.register_forward_hook(lambda *_: None)
    with pytest.raises(nm.NMError, match=r"up \(Linear\) got or lost a hook after nm.compile"):
        sparse(x)
    handle.remove()
    torch.testing.assert_close(sparse(x), expected)


def test_stem_and_head_are_the_first_and_last_weights_over_all_fragments() -> None:
    sparse, _ = branching()
    rows = {row.name: row.reason for row in nm.report(sparse).rows}
    assert rows["stem.weight"].startswith("stem: ")
    assert rows["head.weight"].startswith("head: ")
    assert rows["up.weight"] == rows["last.weight"] == "2:4 along the input axis"


def test_a_mode_that_exports_keeps_its_graph_and_plans_the_weights_of_the_other_branch() -> None:
    class Halves(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.stem(x))
            if not self.training:
                return self.head(self.last(self.up(y) + self.down(y)))
            return self.head(self.last(self.up(y) if x.sum() > 0 else self.down(y)))

    model = Halves()
    sparse = nm.compile(model, positive(), method=nm.SRSTE())
    assert isinstance(sparse.routes[True], Fragments)
    assert "aten.linear" in nm.show(sparse)
    assert {site.name for site in sparse.plan.sites} == {"up.weight", "down.weight", "last.weight"}
    model.dropout.eval()
    for x in (positive(), -positive()):  # the second branch is compiled now and is sparse at once
        state = copy.deepcopy(model.norm.state_dict())
        found = sparse(x)
        model.norm.load_state_dict(state)
        torch.testing.assert_close(found, masked_call(sparse, x))
        assert not torch.allclose(found, dense(model, x))


def test_a_weight_first_seen_in_a_later_branch_is_told_in_the_log_and_in_the_report(caplog: Any) -> None:
    sparse, _ = branching()
    assert {row.name: row.reason for row in nm.report(sparse).rows}["down.weight"] == UNREAD
    with caplog.at_level(logging.WARNING, "nm_compiler"):
        sparse(-positive())
        sparse(-positive())
    assert [r.getMessage() for r in caplog.records if r.name.startswith("nm_compiler")] == [
        "down.weight stays dense: first used after nm.compile, on a path that the example inputs did not take: "
        "give inputs that take it"
    ]
    assert "did not take" in {row.name: row.reason for row in nm.report(sparse).rows}["down.weight"]


@pytest.mark.ci(here=["LBC(scores='position'"])
@pytest.mark.parametrize("method", [nm.SRSTE(decay=0.0), nm.LBC(), nm.LBC(scores="combination")], ids=str)
def test_a_training_step_is_that_of_the_masked_eager_model_in_float64(method: Any) -> None:
    model = Branching().double()
    model.dropout.p = 0.0
    sparse = nm.compile(model, positive(dtype=torch.float64), method=method)
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    for _ in range(2):  # LBC: some combinations retired, some live
        scheduler.step()
    x = positive(dtype=torch.float64)
    masks = {site.name: sparse.masked(site.name)[0] != 0 for site in sparse.plan.sites}
    twin = Branching().double()
    twin.dropout.p = 0.0
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in twin.state_dict()})
    sparse(x).square().mean().backward()
    leaves = {name: (twin.get_parameter(name).detach() * mask).requires_grad_() for name, mask in masks.items()}
    functional_call(twin, leaves, (x,)).square().mean().backward()
    for name, parameter in twin.named_parameters():
        expected = parameter.grad
        if name in masks:
            expected = leaves[name].grad * (masks[name] if isinstance(method, nm.LBC) else 1.0)
        if expected is None:
            assert model.get_parameter(name).grad is None
        else:
            torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean, rtol=1e-12, atol=1e-12)


@pytest.mark.ci(here=["LBC(scores='position'"])
@each_method
def test_training_freezing_and_the_frozen_model_fit_together(method: Any) -> None:
    sparse, model = branching(method)
    train(sparse, 5, nm.SparsityScheduler(sparse, total_steps=5))
    x = positive()
    expected = sparse.eval()(x)
    planned = {site.name for site in sparse.plan.sites}
    frozen = nm.freeze(sparse)
    assert frozen is model
    assert set(frozen.state_dict()) == set(Branching().state_dict())
    torch.testing.assert_close(frozen(x), expected)
    assert planned <= {name for name, axes in nm.verify(frozen).satisfied.items() if 1 in axes}


@pytest.mark.ci
@each_method
def test_copies_and_saved_files_go_on_alone_with_the_same_function(method: Any) -> None:
    sparse, _ = branching(method)
    train(sparse, 3, nm.SparsityScheduler(sparse, total_steps=10))
    x = positive()
    expected = sparse.eval()(x)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(sparse), torch.load(buffer, weights_only=False)]
    train(sparse.train(), 2)
    for twin in twins:
        assert nm.show(twin, training=True) == nm.show(sparse, training=True)
        assert set(twin.masked_parameters()) == set(sparse.masked_parameters())
        torch.testing.assert_close(twin(x), expected)
        train(twin.train(), 1, nm.SparsityScheduler(twin, total_steps=10))
        assert not torch.equal(twin.eval()(x), expected)
        nm.freeze(twin, finish=True)


@pytest.mark.ci
def test_state_dicts_casts_and_assigned_parameters_take_effect_at_the_next_forward() -> None:
    sparse, _ = branching()
    other, _ = branching()
    x = positive()
    sparse.load_state_dict(other.state_dict())
    torch.testing.assert_close(sparse.eval()(x), other.eval()(x))
    sparse.load_state_dict(
        {k: v.clone() * 2 if v.is_floating_point() else v for k, v in other.state_dict().items()}, assign=True
    )
    torch.testing.assert_close(sparse(x), masked_call(sparse, x))
    sparse.double()
    torch.testing.assert_close(sparse(x.double()), masked_call(sparse, x.double()))


@pytest.mark.ci
def test_layers_that_share_their_code_read_each_its_own_weights() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.fc(x))
            torch._dynamo.graph_break()
            return x * 2

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                if x.sum() > 1e6:
                    x = x - 1
            return x

    sparse = nm.compile(Stack(), positive(), method=nm.SRSTE(), include="*")
    x = positive()
    torch.testing.assert_close(sparse.eval()(x), masked_call(sparse, x))
    sparse.train()(x).sum().backward()
    assert len({float(block.fc.weight.grad.norm()) for block in sparse.origin.blocks}) == 12


class Printing(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.stem(x))
        scale = float(y.detach().abs().max().item())
        assert scale >= 0, f"{y}"
        return self.head(self.last(y / (1 + scale)))


def test_graph_breaks_and_item_are_carried() -> None:
    model = Printing()
    sparse = nm.compile(model, positive(), method=nm.LBC())
    x = positive()
    torch.testing.assert_close(sparse(x), dense(model, x))
    assert {site.name for site in sparse.plan.sites} == {"up.weight", "last.weight"}


class Outside(Branching):
    """A weight that runs in a function TorchDynamo is told to leave alone."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.stem(x))
        y = self.left_alone(y) if self.training and x.sum() > 0 else self.last(y)
        return self.head(y)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def left_alone(self, y: Tensor) -> Tensor:
        return self.last(y)  # dense here


class LoopOfExperts(nn.Module):
    """Experts in a loop that asks the data which of them have tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).nonzero().flatten()
            if tokens.numel():
                y = y.index_add(0, tokens, expert(x[tokens]))
        return self.head(y)


@pytest.mark.ci
def test_a_loop_that_asks_the_data_is_followed_layer_by_layer() -> None:
    torch.manual_seed(0)
    names = {"gate.weight", *(f"experts.{at}.weight" for at in range(4))}
    model, x = LoopOfExperts(), torch.randn(40, 8)
    dense = copy.deepcopy(model)
    sparse = nm.compile(model, (x,), method=nm.SRSTE())
    assert {site.name for site in sparse.plan.sites} == names
    with torch.no_grad():
        for name in names:
            weight = dense.get_parameter(name)
            weight.mul_(magnitude_mask(weight, 2, 4, 1))
    torch.testing.assert_close(sparse(x), dense(x))
    assert all(module.__dict__.get("_compiled_call_impl") is None for module in model.modules())
    frozen = nm.freeze(sparse)
    live = nm.compile(frozen)
    live(x).sum().backward()
    assert {row.name for row in nm.report(live).rows if row.runs} == names


class Detector(nn.Module):
    """Looks at its inputs one by one first, as torchvision's detectors do, and has a plain container for a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.between, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for row in x:
            if (row > 1e3).any():
                raise ValueError("too large")
        return self.head(torch.relu(self.between(self.backbone(x))))


def test_layers_of_torch_that_python_calls_between_fragments_are_sparse() -> None:
    torch.manual_seed(0)
    model, x = Detector(), torch.randn(6, 8)
    dense = copy.deepcopy(model)
    sparse = nm.compile(model, (x,), method=nm.SRSTE())
    assert {site.name for site in sparse.plan.sites} == {"backbone.2.weight", "between.weight"}
    with torch.no_grad():
        for site in sparse.plan.sites:
            weight = dense.get_parameter(site.name)
            weight.mul_(magnitude_mask(weight, 2, 4, 1))
    torch.testing.assert_close(sparse(x), dense(x))
    sparse(x).sum().backward()
    dense(x).sum().backward()
    torch.testing.assert_close(model.between.bias.grad, dense.between.bias.grad)
    with pytest.raises(ValueError, match="too large"):
        sparse(x * 1e6)


def test_a_weight_in_a_function_that_dynamo_leaves_alone_is_an_error_with_its_line_or_excluded() -> None:
    model = Outside()
    with pytest.raises(nm.NMError) as error:
        nm.compile(model, positive())
    assert "last.weight is read by code that TorchDynamo does not compile" in str(error.value)
    assert "return self.last(y)  # dense here" in str(error.value)
    assert "exclude='last.weight'" in str(error.value)
    assert "nm_recipe" not in model.state_dict()
    sparse = nm.compile(model, positive(), exclude="last.weight")
    assert {site.name for site in sparse.plan.sites} == {"up.weight"}


class Routed(nn.Module):
    """Every expert takes the rows that chose it, if there are any: a loop that branches on data.

    how: it calls the experts, multiplies with their weights itself, or does that in a method of its own.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        chosen = self.router(y).argmax(-1)
        out = torch.zeros_like(y)
        if self.how == "method":
            return self.head(self.routed(y, chosen, out))
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if rows.numel():
                product = expert(y[rows]) if self.how == "layer" else functional.linear(y[rows], expert.weight, expert.bias)
                out = out.index_add(0, rows, product)
        return self.head(out)

    def routed(self, y: Tensor, chosen: Tensor, out: Tensor) -> Tensor:
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if rows.numel():
                out = self.turn(expert, y, rows, out)
        return out

    def turn(self, expert: nn.Module, y: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        return out.index_add(0, rows, expert(y[rows]))


@pytest.mark.ci
@pytest.mark.parametrize("how", ["layer", "method"])
def test_layers_that_a_loop_which_branches_on_data_calls_are_sparse(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    sparse = nm.compile(Routed(how), x)
    assert {f"experts.{index}.weight" for index in range(3)} <= {site.name for site in sparse.plan.sites}
    torch.testing.assert_close(sparse(x), masked_call(sparse, x))


@pytest.mark.ci
def test_a_loop_that_branches_on_data_and_multiplies_itself_is_an_error_that_names_the_way_out() -> None:
    said = r"experts\.0\.weight is read by code[\s\S]*a loop that branches on data.* a method of its own"
    with pytest.raises(nm.NMError, match=said):
        nm.compile(Routed("weight"), torch.randn(256, 8))


def test_a_planned_weight_that_later_code_reads_outside_fragments_is_an_error_too() -> None:
    model = Outside()
    sparse = nm.compile(model, -positive())
    assert "last.weight" in {site.name for site in sparse.plan.sites}
    with pytest.raises(nm.NMError, match=r"last.weight is read by code[\s\S]*# dense here"):
        sparse(positive())


@pytest.mark.ci
def test_with_dynamo_switched_off_nothing_runs_dense_in_silence() -> None:
    sparse, _ = branching()
    with torch.compiler.set_stance("force_eager"), pytest.raises(nm.NMError, match="weight is read by code that TorchDynamo"):
        sparse(positive())


@pytest.mark.ci
def test_past_the_recompile_limit_there_is_an_error_and_not_dense_code(monkeypatch: Any) -> None:
    class Named(Branching):
        def forward(self, x: Tensor, name: str = "a") -> Tensor:
            y = super().forward(x)
            return y + len(name) if name != "b" else y

    monkeypatch.setattr("nm_compiler.fragments.dynamo._LIMIT", 3)
    config = torch._dynamo.config
    before = (config.fail_on_recompile_limit_hit, config.suppress_errors, config.optimize_ddp)
    sparse = nm.compile(Named(), positive(), method=nm.SRSTE())
    with (
        config.patch(recompile_limit=3),
        pytest.raises(nm.NMError, match=r"would run it without masks[\s\S]*a list of tensors as one"),
    ):
        _ = [sparse(positive(), name) for name in "abcdefgh"]
    assert (config.fail_on_recompile_limit_hit, config.suppress_errors, config.optimize_ddp) == before


@pytest.mark.ci
def test_a_function_whose_first_call_computes_nothing_is_not_left_to_python() -> None:
    class Skipping(Branching):
        def forward(self, x: Tensor, keep: bool = True) -> Tensor:
            y = self.maybe(self.stem(x), keep)
            return self.head(y if y.sum() > 1e9 else y * 2)

        def maybe(self, y: Tensor, keep: bool) -> Tensor:
            torch._dynamo.graph_break()
            return self.up(y) if keep else y

    sparse = nm.compile(Skipping(), positive(), method=nm.SRSTE(), dynamic_shapes=None)
    sparse.eval()
    x = positive()
    for keep in (True, False, True):
        torch.testing.assert_close(sparse(x, keep), masked_call(sparse, x, keep))
    twin = copy.deepcopy(sparse)  # nothing is compiled in it yet
    for keep in (False, True):
        torch.testing.assert_close(twin(x, keep), masked_call(sparse, x, keep))


@pytest.mark.ci
def test_many_models_of_one_class_do_not_share_a_recompile_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr("nm_compiler.fragments.dynamo._LIMIT", 4)
    x = positive()
    with torch._dynamo.config.patch(recompile_limit=4):
        for _ in range(4):
            sparse, _ = branching()
            torch.testing.assert_close(sparse.eval()(x), masked_call(sparse, x))


@pytest.mark.ci
@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask(), nm.SRSTE()], ids=str)
def test_weights_under_checkpointing_are_sparse_and_recomputed_with_the_same_dropout(method: Any) -> None:
    class Checkpointed(Branching):
        recompute = True

        def block(self, y: Tensor) -> Tensor:
            return self.last(self.dropout(torch.tanh(self.up(y))))

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            y = y * 2 if x.sum() > 0 else y
            y = checkpoint(self.block, y, use_reentrant=False) if self.recompute else self.block(y)
            return self.head(y)

    model = Checkpointed()
    sparse = nm.compile(model, positive(), method=method)
    assert {site.name for site in sparse.plan.sites} == {"up.weight", "last.weight"}
    assert "bodies.checkpointed" in nm.show(sparse, training=True)
    x, found = positive(), []
    for recompute in (True, False):
        model.recompute = recompute
        torch.manual_seed(3)
        sparse(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        sparse.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys() >= {"up.weight", "last.weight"}
    torch.testing.assert_close(found[0], found[1])
    sparse.eval()
    torch.testing.assert_close(sparse(x), masked_call(sparse, x))


@pytest.mark.ci
def test_weights_in_the_branches_of_cond_are_sparse() -> None:
    class Cond(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            y = y * 2 if float(x.sum()) > 1e9 else y
            y = torch.cond(x.sum() > 0, lambda y: self.up(y), lambda y: self.down(y) * 2, (y,))
            return self.head(self.last(y))

    model = Cond()
    sparse = nm.compile(model, positive(), method=nm.SRSTE())
    assert {site.name for site in sparse.plan.sites} == {"up.weight", "down.weight", "last.weight"}
    for x in (positive(), -positive()):
        torch.testing.assert_close(sparse(x), masked_call(sparse, x))
        sparse(x).sum().backward()
    assert model.up.weight.grad is not None
    assert model.down.weight.grad is not None


def test_a_custom_backward_in_a_fragment_is_kept() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    class Custom(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = Doubled.apply(self.up(self.stem(x)))
            return self.head(self.last(y if y.sum() > 1e9 else y * 1.0))

    model, x = Custom(), positive()
    model(x).sum().backward()
    expected = model.stem.weight.grad.clone()
    model.zero_grad()
    nm.compile(model, positive(), method=nm.LBC())(x).sum().backward()
    torch.testing.assert_close(model.stem.weight.grad, expected)


def test_the_example_run_leaves_no_trace_on_the_model() -> None:
    class Counting(Branching):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = positive(), torch.get_rng_state()
    sparse = nm.compile(model, x, method=nm.SRSTE())
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items() if name in before)


class Skipping(nn.Module):
    """Leaves its second layer out by chance while it trains, as layerdrop does."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.draw = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        if not self.training or self.draw() > 0.5:
            x = x + torch.relu(self.fc2(x))
        return self.fc3(x)


@pytest.mark.ci(here=["[random"])
@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: np.random.rand()], ids=["random", "numpy"])
def test_what_python_draws_in_training_is_drawn_at_every_call_and_not_kept_in_a_graph(draw: Any) -> None:
    model, x = Skipping(draw), positive()
    plain, skipped = copy.deepcopy(model), set()
    sparse = nm.compile(model, (x,), method=nm.LBC())  # which starts dense
    assert [type(sparse.routes[training]) for training in (False, True)] == [Exported, Fragments]
    assert [site.name for site in sparse.plan.sites] == ["fc2.weight"]
    for seed in range(6):
        random.seed(seed)
        np.random.seed(seed)
        found = sparse(x)
        random.seed(seed)
        np.random.seed(seed)
        skip = draw() <= 0.5
        skipped.add(skip)
        torch.testing.assert_close(found, plain.fc3((h := torch.relu(plain.fc1(x))) + (not skip) * torch.relu(plain.fc2(h))))
    assert skipped == {False, True}


def test_a_random_generator_that_a_layer_keeps_is_an_error_where_torch_compile_would_draw_from_it_once() -> None:
    class Own(Skipping):
        def __init__(self) -> None:
            super().__init__(None)
            self.generator = random.Random(0)

        def forward(self, x: Tensor) -> Tensor:
            self.draw = self.generator.random
            return super().forward(x)

    with pytest.raises(
        nm.NMError, match=r"Own draws from generator in Python, a random.Random of its own.*from the module random"
    ):
        nm.compile(Own(), (positive(),))


@pytest.mark.ci
def test_a_compile_around_the_carrier_leaves_it_to_run_its_own_fragments() -> None:
    sparse, _ = branching()
    fast = torch.compile(sparse.eval(), backend="eager")
    x = positive()
    torch.testing.assert_close(fast(x), masked_call(sparse, x))


def test_a_model_that_fails_on_its_example_is_an_error_with_the_users_line() -> None:
    class Broken(Branching):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                raise ValueError("no positive sums, please")  # the user's line
            return super().forward(x)

    with pytest.raises(nm.NMError, match=r"ValueError: no positive sums[\s\S]*# the user's line"):
        nm.compile(Broken(), positive())


def test_there_is_no_one_graph_of_a_mode_in_fragments() -> None:
    sparse, _ = branching()
    with pytest.raises(nm.NMError, match=r"training mode runs in fragments.*programs\(\)"):
        sparse.graph()
    assert nm.show(sparse).startswith("# fragment 1 of 2\n%")


def test_carriers_and_their_models_are_freed() -> None:
    import gc
    import weakref

    sparse, model = branching()
    sparse(positive())
    gone = weakref.ref(model), weakref.ref(sparse)
    del sparse, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


QUICK = ("computed_weight", "cross_attention", "experts", "left_operand", "shared_weight")


@pytest.mark.ci(here=["shared_weight", "branch_on_data", "experts"])
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in AWKWARD])
def test_both_ways_find_the_same_weights_and_compute_the_same(name: str, monkeypatch: Any) -> None:
    model, args, kwargs = AWKWARD[name]()
    twin = copy.deepcopy(model)
    first = nm.compile(model, args, kwargs, method=nm.SRSTE())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise nm.NMError("not this way") from ValueError()

    monkeypatch.setattr("nm_compiler.capture.routes.capture_mode", refuse)
    second = nm.compile(twin, args, kwargs, method=nm.SRSTE())
    assert all(isinstance(route, Fragments) for route in second.routes.values())
    more = {"frozen.weight"} if name == "frozen" else set()  # export hides what runs under no_grad in a subgraph
    assert [site for site in second.plan.sites if site.name not in more] == list(first.plan.sites)
    assert {refusal.where for refusal in second.plan.refusals} | more == {refusal.where for refusal in first.plan.refusals}
    for mode in () if more else (True, False):
        results = []
        for sparse in (first, second):
            torch.manual_seed(0)
            results.append([leaf for leaf in tree_leaves(sparse.train(mode)(*args, **kwargs)) if isinstance(leaf, Tensor)])
        torch.testing.assert_close(*results)


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.layer(self.stem(x))))


class ReadsData(Between):
    def between(self, y: Tensor) -> Tensor:
        return y / y.data.abs().max()


class Maps(Between):
    def between(self, y: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.layer(row) * row.sum())(y)


class Differentiates(Between):
    def between(self, y: Tensor) -> Tensor:
        return torch.func.grad(lambda z: z.square().sum())(y)


BATCHES_ANY_SIZE = pytest.mark.skipif(torch.__version__ < "2.12", reason="vmap of torch 2.11 takes no sizes that differ")


@pytest.mark.parametrize("kind", [ReadsData, pytest.param(Maps, marks=BATCHES_ANY_SIZE)])
def test_data_of_activations_and_vmaps_in_a_fragment_compute_what_they_do_in_the_model(kind: type[Between]) -> None:
    torch._dynamo.reset()
    model = nm.compile(kind(), method=nm.Magnitude(), then="eager")
    found = []
    for batch in (3, 4):
        x = positive(batch)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        found.append((x, y, model.stem.weight.grad))
    frozen = nm.freeze(model)
    assert list(nm.verify(frozen).satisfied) == ["layer.weight"]
    for x, y, gradient in found:
        frozen.zero_grad()
        torch.testing.assert_close(frozen(x), y)
        frozen(x).square().sum().backward()
        torch.testing.assert_close(frozen.stem.weight.grad, gradient)


def test_a_gradient_that_forward_takes_is_that_of_the_model() -> None:
    torch._dynamo.reset()
    model = Differentiates()
    with torch.no_grad():
        model.layer.weight.unflatten(1, (-1, 4))[..., 2:] = 0  # 2:4, so that no mask changes anything
    dense = copy.deepcopy(model)
    model = nm.compile(model, method=nm.Magnitude(), then="eager")
    for batch in (3, 4):
        x = positive(batch)
        torch.testing.assert_close(model(x), dense(x))


def test_a_tensor_that_the_tracer_loses_is_an_error() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.get_attr("lost"))
    root = nn.Module()
    with torch._subclasses.FakeTensorMode():
        root.register_buffer("lost", torch.zeros(4, 8))
    with pytest.raises(nm.NMError, match=r"shape \[4, 8\] comes from code that cannot be traced"):
        _check_nothing_lost(torch.fx.GraphModule(root, graph))
