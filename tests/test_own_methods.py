# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""A method of one's own: state that learns, and mistakes in writing one, each an error where it is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, example
from torch import Tensor, nn
from torch.fx import GraphModule

import nm_compiler as nm
from nm_compiler.graph import Pass
from nm_compiler.methods.base import Clock
from nm_compiler.ops.define import weight_op
from nm_compiler.passes.insert_op import insert_op
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.state.beside import Weight


def cut(site: Site) -> tuple[int, int, int]:
    return site.pattern.n, site.pattern.m, site.in_axis


def scored(g: Tensor, weight: Tensor, masked: Tensor, scores: Tensor, *rest: int) -> tuple[Tensor, Tensor]:
    return torch.where(masked != 0, g, 0), g * weight


@weight_op("own::scored_weight", gradient=scored)
def scored_weight(weight: Tensor, scores: Tensor, n: int, m: int, in_axis: int) -> Tensor:
    return torch.where(magnitude_mask(scores, n, m, in_axis), weight, 0)


@torch.library.custom_op("own::silent_weight", mutates_args=())
def silent_weight(weight: Tensor, scores: Tensor, n: int, m: int, in_axis: int) -> Tensor:
    return torch.where(magnitude_mask(scores, n, m, in_axis), weight, 0)


silent_weight.register_fake(lambda weight, *rest: torch.empty_like(weight))


@dataclass(frozen=True, slots=True)
class Scored(nm.Method):
    """The weights with the largest scores stay; scores get the gradients of edge-popup."""

    op: Any = scored_weight
    reads: str = "scores"
    gives: Callable[[Tensor], dict[str, Tensor]] = lambda weight: {"scores": nn.Parameter(weight.abs())}
    names: tuple[str, ...] = ("scores",)

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [partial(insert_op, sites=sites, op=self.op, state=(self.reads,), options=cut)]

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return self.gives(weight)

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return self.names


def compiled(method: nm.Method, live: bool) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = MLP().double()
    sparse = (
        nm.compile(model, method=method, then="eager") if live else nm.compile(model, example(model).double(), method=method)
    )
    return sparse, model


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_scores_of_a_weight_op_learn_where_its_gradient_gives_them_one(live: bool) -> None:
    sparse, model = compiled(Scored(), live)
    x = example(model).double()
    sparse(x)
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse), lr=1.0)
    scheduler = nm.SparsityScheduler(sparse, total_steps=3, optimizer=optimizer)
    before, masks = model.fc2.weight_scores.detach().clone(), []
    for _ in range(3):
        optimizer.zero_grad()
        weight, scores = model.fc2.weight.detach().clone(), model.fc2.weight_scores.detach().clone()
        mask = magnitude_mask(scores, 2, 4, 1)
        masks.append(mask)
        used = (weight * mask).requires_grad_()
        hidden = torch.relu(nn.functional.linear(torch.relu(model.fc1(x)), used, model.fc2.bias))
        expected = torch.autograd.grad(model.fc3(hidden).square().sum(), used)[0]
        sparse(x).square().sum().backward()
        torch.testing.assert_close(model.fc2.weight.grad, expected * mask)
        torch.testing.assert_close(model.fc2.weight_scores.grad, expected * weight)
        optimizer.step()
        scheduler.step()
    assert not torch.equal(model.fc2.weight_scores, before)
    assert not torch.equal(masks[0], masks[-1]), "what the scores learned shows in the masks"
    assert nm.verify(nm.freeze(sparse)).satisfied == {"fc2.weight": (1,)}
    assert not [name for name in model.state_dict() if name.endswith("_scores")]


MISTAKES = {
    "suffixes that say nothing": (Scored(names=()), r"fc2.weight of shape \[16, 16\].*gives 'scores', but suffixes\(\) names nothing"),
    "suffixes that say something else": (Scored(names=("score",)), r"gives 'scores', but suffixes\(\) names 'score'"),
    "the weight itself": (Scored(gives=lambda weight: {"scores": weight}), r"fc2.weight.*'scores'.*shares memory with the weight"),
    "a view of the weight": (Scored(gives=lambda weight: {"scores": nn.Parameter(weight.t())}), r"return value.clone\(\)"),
    "a weight that is written to": (Scored(gives=lambda weight: {"scores": nn.Parameter(weight.abs_().clone())}), r"Scored.state\(\) writes to fc2.weight of shape \[16, 16\]"),
    "state that no one gives": (Scored(reads="score"), r"fc2.weight of shape \[16, 16\] has no state 'score'"),
    "an op that says nothing": (Scored(op=silent_weight._opoverload), r"own.silent_weight.*nothing says that it stands for a weight"),
    "what torch.library returns": (Scored(op=silent_weight), r"give torch.ops.<namespace>.<name>.default"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_method_is_named_at_compile_and_leaves_the_model_as_it_was(mistake: str) -> None:
    method, message = MISTAKES[mistake]
    model = MLP()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(nm.NMError, match=message):
        nm.compile(model, example(model), method=method)
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_method_that_is_no_dataclass_is_refused_before_it_fails_to_print_in_a_checkpoint() -> None:
    class Bare(nm.Method):
        def passes(self, sites: Sequence[Site]) -> list[Pass]:
            return []

        def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
            return {}

    with pytest.raises(nm.NMError, match=r"Bare is no dataclass.*@dataclass\(frozen=True\)"):
        nm.compile(MLP(), example(MLP()), method=Bare())


def test_a_method_that_takes_a_dense_weight_for_settled_is_told_so_in_the_report_and_at_freeze() -> None:
    @weight_op("own::dense_weight", gradient=lambda g, *rest: g)
    def dense_weight(weight: Tensor, scores: Tensor, n: int, m: int, in_axis: int) -> Tensor:
        return weight

    model = MLP()
    sparse = nm.compile(model, example(model), method=Scored(op=dense_weight))
    row = next(row for row in nm.report(sparse).rows if row.name == "fc2.weight")
    assert row.nonzero == 1.0
    assert row.reason == "2:4 along the input axis; not 2:4 yet: its mask keeps up to 4 of 4"
    with pytest.raises(nm.NMError, match=r"keeps 4 of 4 in a group, not 2:4, although Scored.is_settled\(\) says so"):
        nm.freeze(sparse)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
@pytest.mark.parametrize(
    ("gradient", "what"),
    [
        (lambda g, *rest: None, r"None for its weight of shape \[16, 16\]"),
        (lambda g, *rest: (g, None), r"None for its argument 1 behind it, which learns, of shape \[16, 16\]"),
        (lambda g, *rest: g, r"None for its argument 1 behind it, which learns, of shape \[16, 16\]"),
    ],
    ids=["nothing", "none for the scores", "the weight's alone"],
)
def test_a_gradient_that_leaves_out_what_learns_is_named_in_the_first_backward_pass(
    gradient: Any, what: str, live: bool
) -> None:
    @weight_op("own::forgetful_weight", gradient=gradient)
    def forgetful_weight(weight: Tensor, scores: Tensor, n: int, m: int, in_axis: int) -> Tensor:
        return torch.where(magnitude_mask(scores, n, m, in_axis), weight, 0)

    sparse, model = compiled(Scored(op=forgetful_weight), live)
    out = sparse(example(model).double()).sum()
    with pytest.raises(nm.NMError, match=r"the gradient of own::forgetful_weight gives " + what):
        out.backward()
    model.fc2.weight.requires_grad_(False)
    model.fc2.weight_scores.requires_grad_(False)
    sparse(example(model).double()).sum().backward()


# -- ops and passes that do not do what a method needs ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stateless(nm.Method):
    """``op`` behind every weight but the first ``skipped``."""

    op: Any
    skipped: int = 0
    options: Callable[[Site], tuple[Any, ...]] = cut

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [partial(insert_op, sites=sites[self.skipped :], op=self.op, options=self.options)]

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return {}


def returning(name: str, found: Callable[[Tensor], Any], gradient: Callable[..., Any] = lambda g, *rest: g) -> Any:
    @weight_op(f"own::{name}", gradient=gradient)
    def op(weight: Tensor, n: int, m: int, in_axis: int) -> Tensor:
        return found(weight)

    return op


def masked(weight: Tensor) -> Tensor:
    return weight * magnitude_mask(weight, 2, 4, 1)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_a_weight_that_the_passes_of_a_method_leave_dense_is_an_error_and_not_a_dense_weight(live: bool) -> None:
    method = Stateless(returning("skips", masked), skipped=1)

    def trained() -> Any:
        sparse, model = compiled(method, live)
        return sparse(example(model).double())

    with pytest.raises(nm.NMError, match=r"fc2.weight of shape \[16, 16\]: the passes of Stateless put no op"):
        trained()


RETURNS = {
    "a row for all of them": lambda weight: masked(weight)[:1],
    "the mask": lambda weight: magnitude_mask(weight, 2, 4, 1),
    "nothing": lambda weight: None,
}


@pytest.mark.parametrize("found", RETURNS)
def test_an_op_that_returns_something_else_than_a_weight_says_so_and_is_not_spread_over_it(found: str) -> None:
    op = returning(f"returns_{found.replace(' ', '_')}", RETURNS[found])
    with pytest.raises(
        nm.NMError, match=r"own::returns_.* returns .* for a weight of \[16, 16\] \(float32, cpu\).*torch.where"
    ):
        nm.compile(MLP(), example(MLP()), method=Stateless(op))(example(MLP()))


def test_an_op_that_writes_to_its_weight_is_an_error_and_does_not_prune_it_for_good() -> None:
    op = returning("writes", lambda weight: weight.mul_(magnitude_mask(weight, 2, 4, 1)))
    with pytest.raises(
        nm.NMError, match=r"own::writes writes to its weight of \[16, 16\].*state is changed in Method.advance"
    ):
        nm.compile(MLP(), example(MLP()), method=Stateless(op))(example(MLP()))


def test_a_gradient_of_another_shape_than_the_weight_is_named_in_the_first_backward_pass() -> None:
    op = returning("thin", masked, gradient=lambda g, *rest: g[None])
    sparse = nm.compile(MLP(), example(MLP()), method=Stateless(op))
    with pytest.raises(nm.NMError, match=r"own::thin gives \[1, 16, 16\] .* for its weight of \[16, 16\]"):
        sparse(example(MLP())).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda site: (2,), r"fc2.weight.*takes n, m, in_axis, but is given 1 arguments"),
        (lambda site: (2, 4, 1, 0), "is given 4 arguments"),
        (lambda site: (torch.tensor(2), 4, 1), "an option of own.fits.default is a tensor"),
        (lambda site: site.pattern.n, r"fc2.weight.*the options of own.fits.default are 2: let options= return a tuple"),
    ],
    ids=["too few", "too many", "a tensor", "no tuple"],
)
def test_options_that_the_op_does_not_take_are_named_at_compile(options: Any, message: str) -> None:
    with pytest.raises(nm.NMError, match=message):
        nm.compile(MLP(), example(MLP()), method=Stateless(returning("fits", masked), options=options))


def test_an_op_without_annotations_or_without_a_namespace_says_what_to_write() -> None:
    def op(weight, n):  # type: ignore[no-untyped-def]
        return weight

    with pytest.raises(nm.NMError, match=r"own::bare.*Annotate every parameter of op.*in_axis: int\) -> Tensor"):
        weight_op("own::bare", gradient=lambda g, *rest: g)(op)
    with pytest.raises(nm.NMError, match="'bare': it needs a namespace of its own"):
        weight_op("bare", gradient=lambda g, *rest: g)(masked)


def test_a_gradient_that_does_not_take_what_the_backward_pass_has_is_named_where_the_op_is_defined() -> None:
    with pytest.raises(nm.NMError, match=r"gradient of own::narrow.*given, g, weight, masked \(too many positional"):
        weight_op("own::narrow", gradient=lambda g: g)(masked)
    assert not hasattr(torch.ops.own, "narrow")


def test_the_class_of_a_method_of_ones_own_is_not_looked_for_in_this_package() -> None:
    with pytest.raises(nm.NMError, match=r"method=Scored is the class: did you mean Scored\(\)"):
        nm.compile(MLP(), example(MLP()), method=Scored)
    options: Any = {"method": Scored(), "then": "eager"}
    with pytest.raises(Exception, match=r"instead of torch.compile, model = nm.compile\(model, method=Scored\(\)\)"):
        torch.compile(MLP(), backend="nm_compiler", options=options)(example(MLP()))


def test_state_that_the_method_gave_no_weight_is_an_error_that_names_the_weight() -> None:
    sparse = nm.compile(MLP(), example(MLP()), method=nm.SRSTE())
    with pytest.raises(nm.NMError, match=r"fc2.weight of shape \[16, 16\] has no state 'scores'"):
        _ = sparse.weights[0]["scores"]


@dataclass(frozen=True, slots=True)
class Given(nm.SRSTE):
    """SR-STE with passes as given."""

    listed: Any = ()

    def passes(self, sites: Sequence[Site]) -> Any:
        return self.listed


def forgetful(gm: GraphModule) -> None:
    """A pass without ``return gm``."""


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([forgetful], "the pass forgetful returned NoneType: let it return the graph"),
        (forgetful, r"Given.passes\(\) gives function: .* as a list"),
    ],
    ids=["returns nothing", "no list"],
)
def test_a_pass_that_returns_no_graph_and_passes_that_are_no_list_are_named(listed: Any, message: str) -> None:
    with pytest.raises(nm.NMError, match=message):
        nm.compile(MLP(), example(MLP()), method=Given(listed=listed))


def test_the_report_is_headed_by_the_options_that_are_not_the_defaults() -> None:
    assert nm.report(nm.compile(MLP(), example(MLP()), method=nm.BiMask())).title == "MLP with BiMask()"
    assert nm.report(nm.compile(MLP(), example(MLP()), method=nm.BiMask(interval=20))).title == "MLP with BiMask(interval=20)"
    assert nm.LBCBiMask(power=4, backward=nm.BiMask(moves=40)).brief() == "LBCBiMask(power=4, backward=BiMask(moves=40))"
    assert nm.Magnitude(importance={"a": torch.ones(2)}).brief() == "Magnitude(importance=given)"


@dataclass(frozen=True, slots=True)
class Undecided(Scored):
    """A method whose author forgot settle()."""

    def is_settled(self, weight: Any) -> bool:
        return False


def test_a_method_that_settle_leaves_undecided_is_not_frozen() -> None:
    model = MLP()
    sparse = nm.compile(model, example(model), method=Undecided())
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    with pytest.raises(nm.NMError, match=r"is not 2:4 after Undecided\.settle\(\)"):
        nm.freeze(sparse, finish=True)
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())


@dataclass(frozen=True, slots=True)
class Failing(Undecided):
    """A method whose settle() fails when it has begun to write."""

    gives: Callable[[Tensor], dict[str, Tensor]] = lambda weight: {"scores": weight.abs()}

    def settle(self, weight: Any) -> None:
        weight["scores"].zero_()
        raise RuntimeError("no more")


def test_a_settle_that_fails_halfway_leaves_the_state_as_it_was() -> None:
    model = MLP()
    sparse = nm.compile(model, example(model), method=Failing())
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    with pytest.raises(RuntimeError, match="no more"):
        nm.freeze(sparse, finish=True)
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())


@weight_op("own::averaged_weight", gradient=lambda g, *rest: g)
def averaged_weight(weight: Tensor, average: Tensor, n: int, m: int, in_axis: int) -> Tensor:
    return torch.where(magnitude_mask(average, n, m, in_axis), weight, 0)


def a_rule(share: float) -> float:
    return share


TENTH = partial(a_rule, 0.1)


@dataclass(frozen=True, slots=True)
class Averaged(Scored):
    """A moving average of magnitudes, written without a thought of gradients."""

    op: Any = averaged_weight
    reads: str = "average"
    gives: Callable[[Tensor], dict[str, Tensor]] = lambda weight: {"average": weight.abs()}
    names: tuple[str, ...] = ("average",)
    share: Callable[[], float] = TENTH

    def advance(self, weights: Sequence[Any], clock: Any) -> None:
        for weight in weights:
            weight["average"].lerp_(weight.param.abs(), self.share())
            weight.param.mul_(0.5)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_what_a_method_does_between_steps_records_no_gradients(live: bool) -> None:
    sparse, model = compiled(Averaged(), live)
    x = example(model).double()
    sparse(x)
    scheduler, before = nm.SparsityScheduler(sparse, total_steps=2), model.fc2.weight.detach().clone()
    for _ in range(2):
        sparse(x).square().sum().backward()
        scheduler.step()
    assert not model.fc2.weight_average.requires_grad
    torch.testing.assert_close(model.fc2.weight.detach(), before / 4)


def test_options_are_shown_the_same_in_every_process() -> None:
    assert "share=functools.partial(<function a_rule>, 0.1)" in str(Averaged())
    assert " at 0x" not in Averaged(share=partial(a_rule, 0.2)).brief()


@dataclass(frozen=True, slots=True)
class Twice(Stateless):
    """Half of every weight, and a mask, one op behind the other."""

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        half = partial(insert_op, sites=sites, op=halved_weight, options=lambda site: ())
        return [half, *Stateless.passes(self, sites)]


@weight_op("own::halved_weight", gradient=lambda g, *rest: g)
def halved_weight(weight: Tensor) -> Tensor:
    return weight / 2


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_two_ops_in_the_place_of_one_weight_are_an_error_and_not_half_of_it_frozen(live: bool) -> None:
    def trained() -> Any:
        sparse, model = compiled(Twice(returning("twice", masked)), live)
        return sparse(example(model).double())

    with pytest.raises(
        nm.NMError, match=r"fc2.weight of shape \[16, 16\]: the passes of Twice put two ops .*twice and then own"
    ):
        trained()


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_a_gradient_that_branches_on_values_runs_eagerly_and_says_what_to_write_where_it_is_compiled(live: bool) -> None:
    branching = returning("branching", masked, gradient=lambda g, *rest: g if float(g.sum()) > 0 else -g)
    x, method = example(MLP()), Stateless(branching)
    nm.compile(MLP(), x, method=method)(x).sum().backward()
    sparse = nm.compile(MLP(), method=method, then="aot_eager") if live else nm.compile(MLP(), x, method=method)
    run = sparse if live else torch.compile(sparse, backend="aot_eager")
    with pytest.raises(Exception, match=r"the gradient of own::branching, of a weight of \[16, 16\].*Write torch.where"):
        run(x).sum().backward()


@dataclass
class Anneal:
    """An option that is no number, and changes."""

    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Annealed(nm.SRSTE):
    anneal: Anneal = field(default_factory=Anneal)

    def advance(self, weights: Sequence[Weight], clock: Clock) -> None:
        self.anneal.strength = 1 - clock.step / clock.total


def test_an_option_that_changes_in_training_is_not_saved_for_a_process_that_could_not_go_on(tmp_path: Path) -> None:
    model = MLP()
    sparse = nm.compile(model, example(model), method=Annealed())
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    nm.save_checkpoint(tmp_path / "run.pt", model=sparse, scheduler=scheduler)
    scheduler.step()
    with pytest.raises(nm.NMError, match=r"strength=1.0.* to .*strength=0.75.*state beside weights"):
        nm.save_checkpoint(tmp_path / "run.pt", model=sparse, scheduler=scheduler)
    nm.load_checkpoint(tmp_path / "run.pt", model=sparse)
