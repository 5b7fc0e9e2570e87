# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Gradual, S-STE, LBC with a Bi-Mask backward, LBC's other schedules, and methods of one's own."""

import copy
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, Grouped, dense, example
from precompiled import precompiled
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.layout import Layout
from nm_compiler.methods.sste import soft_weight, soften
from nm_compiler.pattern import Pattern
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.magnitude import magnitude_mask

NEW = [nm.Gradual(), nm.SSTE(), nm.LBCBiMask(backward=nm.BiMask(interval=2, moves=40)), nm.LBC(power=4), nm.BiMask(fold=True)]
each_method = pytest.mark.parametrize("method", NEW, ids=["Gradual", "SSTE", "LBCBiMask", "LBC-quartic", "BiMask-folded"])


def compiled(kind: Callable[[], nn.Module], method: Any) -> tuple[nm.SparseModule, nn.Module]:
    torch.manual_seed(0)
    return precompiled(kind(), method)


def trained(kind: Callable[[], nn.Module], method: Any, steps: int = 8, total: int = 8) -> tuple[nm.SparseModule, nn.Module]:
    sparse, model = compiled(kind, method)
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse, weight_decay=1e-4), lr=0.05, momentum=0.9)
    scheduler = nm.SparsityScheduler(sparse, total_steps=total, optimizer=optimizer)
    for step in range(steps):
        sparse(example(model, batch=4, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return sparse, model


@pytest.mark.parametrize("method", [nm.BiMask(fold=True), nm.LBCBiMask(backward=nm.BiMask(fold=True))], ids=["BiMask", "LBC"])
def test_a_folded_order_is_in_the_weights_so_that_the_backward_mask_needs_none(method: Any) -> None:
    torch.manual_seed(0)
    model = MLP(width=64).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    before, plain = model(x), copy.deepcopy(model)
    sparse = nm.compile(model, (x,), method=method)
    torch.testing.assert_close(dense(model, x), before)
    assert not torch.equal(model.fc2.weight, plain.fc2.weight), "channels were put in order"
    assert not [name for name in sparse.state_dict() if name.endswith("_order")]
    forward, backward = sparse.masked("fc2.weight")
    assert bool(((backward != 0) <= (forward != 0)).all())
    assert int((backward != 0).unflatten(0, (-1, 4)).sum(1).max()) <= 2, "N:M along the output axis as it lies"
    (row,) = [row for row in nm.report(sparse).rows if row.name == "fc2.weight"]
    twin = nm.compile(copy.deepcopy(plain), (x,), method=nm.BiMask())
    unordered = nm.compile(plain, (x,), method=nm.BiMask(moves=0))
    (other,) = [row for row in nm.report(unordered).rows if row.name == "fc2.weight"]
    if isinstance(method, nm.BiMask):
        assert row.retained + row.backward_kept > other.retained + other.backward_kept
    with pytest.raises(nm.NMError, match="was trained with"):
        twin.load_state_dict(sparse.state_dict())


def test_compile_searches_an_order_that_transposable_masks_keep_more_with() -> None:
    torch.manual_seed(0)
    plain = MLP(width=64)
    kept = []
    for permute in (None, "search"):
        sparse = nm.compile(copy.deepcopy(plain), example(plain), method=nm.Transposable(), permute=permute)
        kept.append(nm.report(sparse).totals["retained"])
    assert kept[1] > kept[0]


@pytest.mark.ci(here=["ConvNet"])
@each_method
@pytest.mark.parametrize("kind", [ConvNet, Grouped, MLP])
def test_the_frozen_model_computes_what_the_sparse_one_did_and_is_exactly_n_m(method: Any, kind: Any) -> None:
    sparse, model = trained(kind, method)
    x = example(model, batch=3, seed=9)
    expected = sparse.eval()(x)
    names = {weight.site.name for weight in sparse.weights}
    frozen = nm.freeze(sparse)
    torch.testing.assert_close(frozen.eval()(x), expected)
    assert names <= set(nm.verify(frozen).satisfied)


@each_method
def test_state_is_saved_copied_and_loaded_and_a_dense_checkpoint_starts_it_afresh(method: Any) -> None:
    sparse, model = trained(ConvNet, method, steps=5, total=8)
    x = example(model, seed=3)
    dense = ConvNet().state_dict()
    twin = copy.deepcopy(sparse)
    other, _ = compiled(ConvNet, method)
    other.load_state_dict(sparse.state_dict())
    for each in (twin, other):
        assert torch.equal(each.eval()(x), sparse.eval()(x))
    fresh, _ = compiled(ConvNet, method)
    fresh.origin.load_state_dict({**fresh.state_dict(), **dense})
    twin.load_state_dict(dense)
    for suffix in method.suffixes(twin.weights[0].site):
        wanted = method.state(twin.weights[0].site, dense["conv1.weight"])[suffix]
        assert torch.equal(twin.weights[0][suffix], wanted)


@pytest.mark.ci(here=["[LBC"])
@each_method
def test_a_compiled_step_gives_the_same_gradients_without_a_graph_break(method: Any) -> None:
    sparse, model = compiled(ConvNet, method)
    twin = copy.deepcopy(sparse)
    x = example(model, batch=4)
    sparse(x).square().mean().backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    for (name, parameter), other in zip(sparse.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@pytest.mark.parametrize("power", [1, 3, 4])
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:16"])
def test_lbc_retires_by_the_power_that_was_asked_for(power: int, text: str) -> None:
    model = nn.Linear(16, 4)
    sparse = nm.compile(model, torch.randn(2, 16), pattern=text, method=nm.LBC(power=power), include="*")
    method, site = sparse.method, sparse.weights[0].site
    entries = site.pattern.combinations
    for step in range(21):
        left = 1 - Fraction(min(step, 10), 10)
        assert method.live_count(site, step, 20) == 1 + math.ceil((entries - 1) * left**power)


@pytest.mark.parametrize("make", [lambda: nm.LBC(power=0), lambda: nm.LBC(power=2.5), lambda: nm.Gradual(power=9),
                                  lambda: nm.Gradual(t_i=0.6, t_f=0.5), lambda: nm.Gradual(t_f="x")])  # fmt: skip
def test_schedules_out_of_range_cannot_be_built(make: Callable[[], Any]) -> None:
    with pytest.raises(nm.NMError, match=r"(LBC|Gradual)\((power|t_i)="):
        make()


# -- LBC with a Bi-Mask backward ---------------------------------------------------------------------------------------------


def test_lbc_with_a_bimask_backward_runs_forward_as_lbc_and_back_through_n_of_m_output_channels() -> None:
    """On one linear layer: y and dW are LBC's, dx = g (W * B), B the N largest of every M outputs of W * F in the order."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8)
    order = torch.tensor([3, 1, 0, 6, 2, 7, 5, 4])
    outputs, gradients, inputs = [], [], []
    for method in (nm.LBC(), nm.LBCBiMask()):
        model = nn.Linear(8, 8, bias=False)
        model.weight.data.copy_(weight)
        sparse = nm.compile(model, torch.randn(2, 8), method=method, include="*")
        method.settle(sparse.weights[0])
        if isinstance(method, nm.LBCBiMask):
            model.weight_order.copy_(order)
        x = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        y = sparse(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append(model.weight.grad)
        inputs.append(x.grad)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    forward = sparse.masked("weight")[0]
    kept = torch.zeros_like(forward)
    for column, start in itertools.product(range(8), (0, 4)):
        rows = order[start : start + 4].tolist()
        for row in sorted(rows, key=lambda r: -abs(float(forward[r, column])))[:2]:
            kept[row, column] = forward[row, column]
    assert not torch.equal(kept, forward)
    torch.testing.assert_close(inputs[1], (2 * outputs[1]) @ kept)
    torch.testing.assert_close(inputs[0], (2 * outputs[0]) @ forward)


def test_the_order_is_searched_for_the_mask_that_lbc_has_learned() -> None:
    seen: list[Tensor] = []

    def search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
        seen.append(importance)
        return order

    method = nm.LBCBiMask(t_i=0.2, t_f=0.4, backward=nm.BiMask(interval=4, search=search))
    sparse, _ = trained(MLP, method, steps=5, total=10)
    assert len(seen) == 2
    assert bool((seen[0] > 0).all()), "at first LBC keeps all"
    mask = method.forward_mask(sparse.weights[0])
    assert torch.equal(seen[1] > 0, mask)
    assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert torch.equal(mask, sparse.masked("fc2.weight")[0] != 0)
    assert "0x" not in str(method)
    assert "backward=BiMask(interval=4" in str(method)


# -- gradual -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2:4", "1:4", "1:16"])
def test_gradual_starts_dense_and_only_ever_prunes_the_smallest_that_are_left(text: str) -> None:
    torch.manual_seed(0)
    method, model = nm.Gradual(t_i=0.1, t_f=0.6), nn.Linear(32, 4)
    sparse = nm.compile(model, torch.randn(2, 32), pattern=text, method=method, include="*")
    weight, total = sparse.weights[0], 20
    scheduler = nm.SparsityScheduler(sparse, total_steps=total)
    n, m = weight.site.pattern.n, weight.site.pattern.m
    before = torch.ones(4, 32, dtype=torch.bool)
    assert torch.equal(sparse.masked("weight")[0], model.weight)
    for step in range(1, total + 1):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 32), alpha=0.3)
        scheduler.step()
        mask = sparse.masked("weight")[0] != 0
        keep = n + math.ceil(Fraction(m - n) * (1 - Fraction(min(max(step, 2), 12) - 2, 10)) ** 3)
        assert bool((mask.unflatten(1, (-1, m)).sum(-1) == keep).all())
        assert not bool((mask & ~before).any()), "a pruned weight came back"
        groups = model.weight.detach().abs().unflatten(1, (-1, m))
        inside, gone = mask.unflatten(1, (-1, m)), (before & ~mask).unflatten(1, (-1, m))
        least = groups.masked_fill(~inside, math.inf).amin(-1)
        assert bool((groups.masked_fill(~gone, -math.inf).amax(-1) <= least).all())
        before = mask
    assert method.is_settled(weight)


def test_gradual_takes_its_schedule_in_order_and_a_checkpoint_of_another_one_is_refused() -> None:
    assert nm.Gradual(0.1, 0.4, 2) == nm.Gradual(t_i=0.1, t_f=0.4, power=2)
    with pytest.raises(TypeError):
        nm.Gradual(importance={})  # type: ignore[call-arg]  # it prunes by magnitude, and would not look at it
    schedulers = [nm.SparsityScheduler(compiled(MLP, nm.Gradual(t_f=t_f))[0], total_steps=8) for t_f in (0.3, 0.7)]
    with pytest.raises(nm.NMError, match=r"saved for Gradual\(t_i=0.0, t_f=0.3, power=3\)"):
        schedulers[1].load_state_dict(schedulers[0].state_dict())


def test_gradual_can_be_finished_early_and_refuses_a_mask_that_keeps_too_few() -> None:
    sparse, _ = trained(MLP, nm.Gradual(), steps=1)
    with pytest.raises(nm.NMError, match="are not 2:4 yet"):
        nm.freeze(sparse)
    assert "more than N of a group" in str(nm.report(sparse))
    wrong = {**sparse.state_dict(), "fc2.weight_mask": torch.zeros_like(sparse.weights[0]["mask"])}
    with pytest.raises(nm.NMError, match="the mask keeps 0 of a group, at least 2 must stay"):
        sparse.load_state_dict(wrong)
    assert set(nm.verify(nm.freeze(sparse, finish=True)).satisfied) == {"fc2.weight"}


# -- S-STE -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_soft_threshold_takes_the_next_magnitude_off_and_changes_continuously(n: int, m: int, axis: int) -> None:
    weight = torch.randn(32, 32, dtype=torch.float64)
    soft = soften(weight, n, m, axis)
    groups, left = (each.movedim(axis, -1).unflatten(-1, (-1, m)) for each in (weight, soft))
    threshold = groups.abs().sort(-1, descending=True).values[..., n : n + 1]
    torch.testing.assert_close(left, groups.sgn() * (groups.abs() - threshold).clamp_min(0))
    assert torch.equal(soft != 0, magnitude_mask(weight, n, m, axis))
    moved = soften(weight + 1e-9, n, m, axis)
    assert float((moved - soft).abs().max()) <= 3e-9


def test_s_ste_scales_so_that_the_soft_weight_is_nearest_and_its_gradient_goes_straight_through() -> None:
    model = nn.Linear(8, 4, bias=False).double()
    sparse = nm.compile(model, torch.randn(2, 8).double(), method=nm.SSTE(), include="*")
    soft, scale = soften(model.weight.detach(), 2, 4, 1), float(model.weight_scale)

    def distance(beta: float) -> float:
        return float((model.weight.detach() - beta * soft).norm())

    assert distance(scale) < min(distance(0.999 * scale), distance(1.001 * scale))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = sparse(x)
    torch.testing.assert_close(y, x @ (scale * soft).T)
    y.sum().backward()
    torch.testing.assert_close(model.weight.grad, scale * torch.ones(3, 4).double().T @ x.detach())
    torch.testing.assert_close(x.grad, torch.ones(3, 4).double() @ (scale * soft))
    with pytest.raises(nm.NMError, match="the scale is -1.0, it must be a positive number"):
        sparse.load_state_dict({**sparse.state_dict(), "weight_scale": torch.tensor(-1.0, dtype=torch.float64)})


@pytest.mark.parametrize("size", [30.0, 1e-4])
def test_s_stes_scale_of_float16_weights_is_that_of_float32_where_squares_are_beyond_float16(size: float) -> None:
    model = nn.Linear(64, 64, bias=False)
    model.weight.data = (size * torch.randn(64, 64)).half()
    wanted = nm.SSTE().state(Site("weight", "linear", (64, 64), Layout(1, 0), Pattern(2, 4)), model.weight.detach().float())[
        "scale"
    ]
    nm.compile(model.half(), torch.randn(2, 64).half(), method=nm.SSTE(), include="*")
    torch.testing.assert_close(model.weight_scale.float(), wanted, rtol=1e-3, atol=0)


def test_the_op_of_a_method_passes_opcheck_in_any_memory_layout() -> None:
    for weight in (torch.randn(8, 8, 3, 3), torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last)):
        torch.library.opcheck(soft_weight, (weight.requires_grad_(), torch.tensor(1.5), 2, 4, 1))


# -- decoupled decay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nm.SRSTE, nm.BiMask])
def test_a_decoupled_decay_pulls_pruned_weights_by_the_learning_rate_and_momentum_does_not_see_it(kind: Any) -> None:
    """Beside a twin without any decay: the same gradients and momenta, and after the step W -= lr * decay * (1 - F) * W."""
    runs = []
    for method in (kind(decay=0.0), kind(decay=0.5, decoupled=True)):
        sparse, model = compiled(MLP, method)
        optimizer = torch.optim.SGD(
            [{"params": model.fc2.parameters(), "lr": 0.2}, {"params": model.fc1.parameters()}], lr=0.1, momentum=0.9
        )
        runs.append((sparse, model, optimizer, nm.SparsityScheduler(sparse, total_steps=3, optimizer=optimizer)))
    x = example(runs[0][1], batch=4)
    for sparse, _, optimizer, scheduler in runs:
        sparse(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
    plain, pulled = (model.fc2.weight for _, model, _, _ in runs)
    mask = magnitude_mask(plain.detach(), 2, 4, 1)
    torch.testing.assert_close(pulled, torch.where(mask, plain, plain * (1 - 0.2 * 0.5)))
    momenta = [run[2].state[run[1].fc2.weight]["momentum_buffer"] for run in runs]
    assert torch.equal(momenta[0], momenta[1])


@pytest.mark.parametrize("kind", [nm.SRSTE, nm.BiMask])
def test_a_decoupled_decay_without_the_optimizer_is_refused(kind: Any) -> None:
    with pytest.raises(nm.NMError, match=r"\(decoupled=True\) needs the learning rate: SparsityScheduler\(..., optimizer="):
        nm.SparsityScheduler(compiled(MLP, kind(decoupled=True))[0], total_steps=3)


# -- what docs/methods.md says of the pull ----------------------------------------------------------------------------------


@pytest.mark.ci(here=["SRSTE"])
@pytest.mark.parametrize("method", [nm.SRSTE, nm.BiMask], ids=lambda method: method.__name__)
def test_the_pull_in_the_gradient_comes_with_every_backward_pass_and_a_decoupled_one_once_a_step(method: Any) -> None:
    def gradient(model: nn.Module, sparse: nn.Module, times: int, scale: float) -> Tensor:
        for _ in range(times):
            (sparse(example(model).double()).square().sum() * scale / times).backward()
        found = model.get_parameter("fc2.weight").grad
        assert found is not None
        return found / scale

    def once(decay: float, decoupled: bool, times: int = 1, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = MLP().double()
        sparse = nm.compile(model, example(model).double(), method=method(decay=decay, decoupled=decoupled))
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.5)
        scheduler = nm.SparsityScheduler(sparse, total_steps=2, optimizer=optimizer)
        found = gradient(model, sparse, times, scale)
        before = model.get_parameter("fc2.weight").detach().clone()
        scheduler.step()
        return found, before - model.get_parameter("fc2.weight").detach()

    plain, _ = once(0.0, decoupled=False)
    torch.manual_seed(0)
    weight = MLP().double().fc2.weight.detach()
    pull = weight * ~magnitude_mask(weight, 2, 4, 1)
    for times, scale, counted in ((1, 1.0, 1.0), (3, 1.0, 3.0), (1, 1024.0, 1 / 1024)):
        coupled, moved = once(0.1, decoupled=False, times=times, scale=scale)
        torch.testing.assert_close(coupled, plain + 0.1 * counted * pull)
        assert not moved.any()
        free, moved = once(0.1, decoupled=True, times=times, scale=scale)
        torch.testing.assert_close(free, plain)
        torch.testing.assert_close(moved, 0.5 * 0.1 * pull)
