"""Importances beside magnitude, and the calibration that they need: what every weight is multiplied with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import MLP, Attention, ConvNet, Matmuls
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.solvers.importance import ria, wanda
from nm_compiler.solvers.magnitude import magnitude_mask


class Layers(nn.Module):
    """Weights that meet data in different ways; ``seen`` keeps what they met."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.product = nn.Parameter(torch.randn(16, 12))
        self.twice = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.linear(x)) @ self.product
        y: Tensor = self.head(self.twice(torch.tanh(self.twice(h))))
        return y


def linear_squares(x: Tensor) -> Tensor:
    squares: Tensor = x.double().square().flatten(0, -2).sum(0)
    return squares


def test_linears_matmuls_and_weights_used_twice_are_measured_over_all_batches() -> None:
    model, batches = Layers(), [torch.randn(5, 8), torch.randn(3, 8), torch.randn(7, 8)]
    stats = nm.calibrate(model, batches)
    assert stats.batches == 3
    expected = {name: torch.zeros(size, dtype=torch.float64) for name, size in (("linear", 8), ("product", 16), ("twice", 12))}
    for x in batches:
        h = torch.relu(model.linear(x))
        first = h @ model.product
        expected["linear"] += linear_squares(x)
        expected["product"] += linear_squares(h)
        expected["twice"] += linear_squares(first) + linear_squares(torch.tanh(model.twice(first)))
    torch.testing.assert_close(stats["linear.weight"].expand(16, 8)[3], expected["linear"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats["product"].expand(16, 12)[:, 5], expected["product"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats["twice.weight"].expand(12, 12)[0], expected["twice"], rtol=1e-5, atol=1e-6)
    assert all(value.dtype == torch.float64 for value in stats.values())


@pytest.mark.parametrize(("groups", "stride", "padding", "taps"), [(1, 1, 1, 3), (1, 2, 0, 3), (2, 1, 2, 5), (1, 1, 0, 1)])
def test_convolutions_are_measured_tap_by_tap_with_stride_padding_and_groups(
    groups: int, stride: int, padding: int, taps: int
) -> None:
    conv = nn.Conv2d(8, 12, taps, stride=stride, padding=padding, groups=groups)
    x = torch.randn(3, 8, 9, 7)
    stats = nm.calibrate(nn.Sequential(conv, nn.ReLU()), [x])
    patches = functional.unfold(x.double(), taps, padding=padding, stride=stride)  # [batch, 8 * taps * taps, positions]
    squares = patches.square().sum((0, 2)).reshape(groups, 8 // groups, taps, taps)
    expected = squares.repeat_interleave(12 // groups, 0).reshape(12, 8 // groups, taps, taps)
    torch.testing.assert_close(stats["0.weight"].expand_as(conv.weight), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.ci(here=["attention"])
@pytest.mark.parametrize("make", [lambda: (ConvNet(), torch.randn(4, 3, 8, 8)), lambda: (Attention(), torch.randint(12, (4, 6))),
                                  lambda: (Matmuls(), torch.randn(4, 8))], ids=["conv", "attention", "matmuls"])  # fmt: skip
def test_calibration_leaves_the_model_as_it_was_and_measures_every_weight_that_can_be_sparse(make: Any) -> None:
    model, x = make()
    model.train()
    before = copy.deepcopy(model.state_dict())
    stats = nm.calibrate(model, [x, x, x], most=2)
    assert stats.batches == 2
    assert model.training
    assert not any(p.grad is not None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    sparse = nm.compile(copy.deepcopy(model), (x,), include="*")
    for weight in sparse.weights:
        squares = stats[weight.site.name]
        assert torch.broadcast_shapes(squares.shape, weight.param.shape) == weight.param.shape
        assert bool((squares >= 0).all())
        assert bool((squares > 0).any())


def test_batches_may_be_tuples_with_labels_or_mappings() -> None:
    model, x = Layers(), torch.randn(4, 8)
    plain = nm.calibrate(model, [x])
    for batch in ((x, torch.zeros(4)), [x], {"x": x}):
        found = nm.calibrate(model, [batch])
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_wanda_and_ria_are_the_papers_formulas() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 12), nn.ReLU())
    x = torch.randn(20, 8)
    stats = nm.calibrate(model, [x])
    w, norms = model[0].weight.detach().double().numpy(), np.sqrt((x.double().numpy() ** 2).sum(0))
    magnitude = np.abs(w)
    wanda = magnitude * norms
    ria = (magnitude / magnitude.sum(1, keepdims=True) + magnitude / magnitude.sum(0, keepdims=True)) * norms**0.5
    for rule, expected in ((nm.Wanda(stats), wanda), (nm.RIA(stats), ria)):
        sparse = nm.compile(copy.deepcopy(model), (x,), method=nm.Magnitude(importance=rule), include="*")
        found = rule(sparse.weights[0].site, model[0].weight)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
        kept = nm.freeze(sparse).get_parameter("0.weight") != 0
        groups = expected.reshape(12, 2, 4)
        ranks = (groups[..., None] < groups[..., None, :]).sum(-1)
        np.testing.assert_array_equal(kept.numpy(), (ranks < 2).reshape(12, 8))


class Routed(nn.Module):
    """Three experts, of which a token meets the one that it names: a grouped matmul, as in Hugging Face's mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._grouped_mm(x, self.experts.transpose(-2, -1), counts.cumsum(0).to(torch.int32))
        return y


@pytest.mark.parametrize("rule", [nm.Wanda, nm.RIA], ids=["Wanda", "RIA"])
def test_magnitude_decides_where_no_token_came_and_among_inputs_that_were_always_zero(rule: Any, caplog: Any) -> None:
    model, x = Routed().to(torch.bfloat16), torch.randn(12, 16).to(torch.bfloat16)
    x[:, 4:7] = 0
    batch = (x, torch.tensor([8, 4, 0]))  # twelve tokens, none for the last expert
    stats = nm.calibrate(model, [batch])
    assert "experts: 1 of its 3 experts met nothing but zeros in 1 batches" in caplog.text
    torch.testing.assert_close(stats["experts"][1, 0], x[8:].double().square().sum(0), rtol=1e-5, atol=1e-5)
    sparse = nm.compile(copy.deepcopy(model), batch, method=nm.Magnitude(importance=rule(stats)), include="*")
    kept = nm.freeze(sparse).get_parameter("experts").reshape(3, 16, 4, 4) != 0
    size = model.experts.detach().float().abs().reshape(3, 16, 4, 4)
    if rule is nm.RIA:
        size = size / size.sum((2, 3), keepdim=True) + size / size.sum(1, keepdim=True)
    ranks = (size[..., None] < size[..., None, :]).sum(-1)
    assert torch.equal(kept[2], ranks[2] < 2)
    dead = ranks[:2, :, 1, :3].argmin(-1)  # of inputs 4 to 6 the largest weight is kept, and that of input 7
    assert torch.equal(kept[:2, :, 1, :3].int().argmax(-1), dead)
    assert bool(kept[:2, :, 1, 3].all())


class Wary(nn.Module):
    """Its training mode branches on data, which no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(x.sum()) > 0:
            x = x + 1
        y: Tensor = self.fc(x)
        return y


def test_calibration_asks_nothing_of_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nm_compiler.capture.routes._fragments", None)
    assert set(nm.calibrate(Wary(), [torch.randn(4, 8)])) == {"fc.weight"}


def test_half_precision_is_measured_in_float32() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).half()
    x = (100 * torch.randn(64, 8)).half()
    stats = nm.calibrate(model, [x])
    torch.testing.assert_close(stats["0.weight"][0], linear_squares(x), rtol=1e-5, atol=0)  # beyond 65504 each


@pytest.mark.parametrize("rule", [nm.Wanda, nm.RIA], ids=["Wanda", "RIA"])
def test_masks_that_know_the_inputs_change_the_outputs_less(rule: Any) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    x = torch.randn(200, 64) * torch.logspace(-2, 1, 64)[torch.randperm(64)]
    expected = model(x)

    def error(method: nm.Magnitude) -> float:
        pruned = nm.freeze(nm.compile(copy.deepcopy(model), (x,), method=method, include="*"))
        assert nm.verify(pruned, "2:4").satisfied
        return float(((pruned(x) - expected).norm() / expected.norm()).detach())

    assert error(nm.Magnitude(importance=rule(nm.calibrate(model, [x])))) < 0.6 * error(nm.Magnitude())


def test_saliency_is_weight_times_gradient() -> None:
    model, x = Layers(), torch.randn(6, 8)
    model(x).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    sparse = nm.compile(copy.deepcopy(model), (x,), method=nm.Magnitude(importance=nm.Saliency(gradients)))
    pruned = nm.freeze(sparse)
    weight = model.twice.weight
    expected = magnitude_mask(weight.detach() * gradients["twice.weight"], 2, 4, 1)
    assert torch.equal(pruned.get_parameter("twice.weight") != 0, expected & (weight != 0))


def test_a_permutation_can_keep_what_wanda_finds_important() -> None:
    model, x = Layers(), torch.randn(50, 8)
    stats = nm.calibrate(model, [x])
    before = model(x)
    permutation = nm.permute(model, (x,), importance=nm.Wanda(stats), budget_s=0.2)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert permutation.gains
    assert all(gain.after >= gain.before for gain in permutation.gains)


@pytest.mark.ci(here=["Wanda-search", "RIA-random"])
@pytest.mark.parametrize("permute", ["search", "random"])
@pytest.mark.parametrize("rule", [nm.Wanda, nm.RIA])
def test_an_importance_moves_with_the_channels_that_compile_permutes(permute: str, rule: Any) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 32), nn.Linear(32, 16)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(64, 8) * torch.linspace(0.1, 3, 8)
    plain, stats = first.weight.detach().clone(), nm.calibrate(model, [x])
    kept = {name: squares.clone() for name, squares in stats.items()}
    sparse = nm.compile(model, (x,), method=nm.Magnitude(importance=rule(stats)), permute=permute)
    assert not torch.equal(first.weight, plain), "channels were put in another order"
    assert all(torch.equal(stats[name], squares) for name, squares in kept.items()), "the user's statistics stay"
    inner = torch.relu(first(x)).detach().square().sum(0)
    importance = wanda(second.weight, inner) if rule is nm.Wanda else ria(second.weight, inner, out_axis=0, row_axes=[1])
    assert torch.equal(sparse.masked("2.weight")[0] != 0, magnitude_mask(importance, 2, 4, 1))


@pytest.mark.ci(here=["Wanda-live"])
@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
@pytest.mark.parametrize("rule", [nm.Wanda, nm.RIA])
def test_statistics_of_before_a_permutation_are_refused_after_it(rule: Any, live: bool) -> None:
    def compiled() -> Any:
        method = nm.Magnitude(importance=rule(stats))
        return nm.compile(model, method=method, then="eager") if live else nm.compile(model, (x,), method=method)

    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(4, 3, 8, 8)
    stats = nm.calibrate(model, [x])
    before, permutation = dict(model.state_dict()), nm.permute(model, (x,), order="random")
    with pytest.raises(nm.NMError, match=r"conv\d.weight of shape .* in another order.*: calibrate again"):
        compiled()
    assert list(model.state_dict()) == list(before)
    permutation.undo(model)
    compiled()


@pytest.mark.ci(here=["trained on", "cast"])
@pytest.mark.parametrize("change", ["trained on", "rounded", "cast", "reinitialised", "scaled"])
def test_weights_that_were_changed_but_not_moved_take_statistics_of_before(change: str) -> None:
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(6, 8)
    stats = nm.calibrate(model, [x])
    with torch.no_grad():
        for parameter in model.parameters():
            if change == "trained on":
                parameter.add_(torch.randn_like(parameter), alpha=1e-4)
            elif change == "reinitialised":
                parameter.normal_()
            elif change == "scaled":
                parameter.mul_(2)
    model = model.bfloat16() if change == "rounded" else model.double() if change == "cast" else model
    x = x.to(model.linear.weight.dtype)
    assert nm.compile(model, (x,), method=nm.Magnitude(importance=nm.Wanda(stats))).plan.sites


def test_transposable_masks_take_an_importance_too() -> None:
    model, x = Layers(), torch.randn(6, 8)
    importance = {"twice.weight": torch.rand(12, 12)}
    pruned = nm.freeze(nm.compile(copy.deepcopy(model), (x,), method=nm.Transposable(importance=importance)))
    kept = pruned.get_parameter("twice.weight") != 0
    plain = nm.freeze(nm.compile(copy.deepcopy(model), (x,), method=nm.Transposable())).get_parameter("twice.weight") != 0
    assert (kept * importance["twice.weight"]).sum() > (plain * importance["twice.weight"]).sum()
    assert int(kept.unflatten(0, (-1, 4)).sum(1).max()) <= 2


@pytest.mark.parametrize(
    ("importance", "said"),
    [("wanda", r"importance='wanda': give nm.Wanda\(nm.calibrate\(model, loader\)\)"),
     (lambda site, weight: 1.0, r"importance of product is a float: give a tensor of shape"),
     (lambda site, weight: weight.abs_(), r"importance= writes to product of shape \[16, 12\].*return a new tensor"),
     ({"twice.weight": torch.ones(3, 3)}, r"twice.weight has shape \[3, 3\]"),
     ({"twice.weight": torch.full((12, 12), float("nan"))}, "twice.weight has NaN"),
     ({"twice.weight": -torch.ones(12, 12)}, "twice.weight has NaN, infinite or negative"),
     (nm.Wanda({}), "has no inputs here")],
)  # fmt: skip
def test_importances_that_do_not_fit_are_errors_that_name_the_weight_and_change_nothing(importance: Any, said: str) -> None:
    model = Layers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(nm.NMError, match=said):
        nm.compile(model, (torch.randn(2, 8),), method=nm.Magnitude(importance=importance))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_without_a_batch_or_with_one_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(nm.NMError, match="no batch"):
        nm.calibrate(Layers(), [])
    with pytest.raises(
        nm.NMError, match=r"batch 2 of nm.calibrate: .*size 9 on axis 1(.|\n)*all but axis 0\. .*dynamic_shapes="
    ) as error:
        nm.calibrate(Layers(), [torch.randn(2, 8), torch.randn(2, 9)])
    assert "nm.compile" not in str(error.value)


def test_a_model_that_is_no_graph_is_told_the_line_that_stops_its_calibration() -> None:
    class Asking(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(nm.NMError, match=r"Asking could not be captured in evaluation mode(.|\n)*x if x.sum\(\) > 0 else -x"):
        nm.calibrate(Asking(), [torch.randn(2, 8)])


@pytest.mark.ci(here=["AUTO"])
@pytest.mark.parametrize("free", [torch.export.Dim.AUTO, torch.export.Dim("batch")], ids=["AUTO", "Dim"])
def test_a_first_batch_of_one_leaves_free_what_dynamic_shapes_frees(free: Any) -> None:
    model, batches = Layers(), [torch.randn(1, 3, 8), torch.randn(2, 5, 8)]
    stats = nm.calibrate(model, batches, dynamic_shapes=({0: free, 1: torch.export.Dim.AUTO},))
    expected = sum(linear_squares(x) for x in batches)
    torch.testing.assert_close(stats["linear.weight"][0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(nm.NMError, match="has size 2 on axis 0, where 1 was captured"):
        nm.calibrate(model, batches, dynamic_shapes=({1: torch.export.Dim.AUTO},))


def test_a_method_with_an_importance_prints_in_one_short_line() -> None:
    stats = nm.calibrate(Layers(), [torch.randn(2, 8)])
    assert str(nm.Magnitude(importance=nm.Wanda(stats))) == "Magnitude(importance=Wanda())"
    assert str(nm.Magnitude(importance={"a": torch.ones(2)})) == "Magnitude(importance=given)"
    assert str(nm.Magnitude()) == "Magnitude()"


@pytest.mark.parametrize("way", ["captured", "live", "permute"])
def test_an_importance_under_a_name_that_no_parameter_has_is_an_error_and_nothing_changes(way: str) -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(4, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strays = {"1.weigth": torch.ones(8, 8)}
    call: dict[str, Callable[[], Any]] = {
        "captured": lambda: nm.compile(model, (x,), method=nm.Magnitude(importance=strays)),
        "live": lambda: nm.compile(model, method=nm.Magnitude(importance=strays)),
        "permute": lambda: nm.permute(model, (x,), importance=strays),
    }
    with pytest.raises(nm.NMError, match=r"importance= has '1.weigth', .* did you mean '1.weight'\?"):
        call[way]()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_measures_what_pattern_include_and_exclude_leave() -> None:
    model, x = MLP(), torch.randn(4, 8)
    assert set(nm.calibrate(model, [x], exclude="fc1*")) == {"fc2.weight", "fc3.weight"}
    assert set(nm.calibrate(model, [x], include="fc2*")) == {"fc2.weight"}, "stem and head are measured by default only"
    assert set(nm.calibrate(model, [x], pattern={"fc[12]*": "2:4"})) == {"fc1.weight", "fc2.weight"}
    assert set(nm.calibrate(model, [x], pattern="2:16")) == {"fc2.weight", "fc3.weight"}
