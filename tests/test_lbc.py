# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""LBC over many steps: the two layouts agree, combinations retire on schedule and never return."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import MLP, dense, example
from torch import nn

import nm_compiler as nm
from nm_compiler.layout import Layout
from nm_compiler.methods.lbc import LBC
from nm_compiler.pattern import Pattern
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.combinations import count, unpack
from nm_compiler.solvers.magnitude import magnitude_mask

STEPS = 600


def train(sparse: nm.SparseModule, scheduler: nm.SparsityScheduler, optimizer: torch.optim.Optimizer, seed: int) -> Any:
    """One step of regression on fresh random data, after which the scheduler has been called. Returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    loss = (sparse(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    return loss.detach()


def start(method: LBC, text: str, steps: int) -> tuple[nm.SparseModule, nm.SparsityScheduler, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = MLP(16).double()
    sparse = nm.compile(model, example(model).double(), pattern=text, method=method)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    return sparse, nm.SparsityScheduler(sparse, total_steps=steps), optimizer


def live_bits(sparse: nm.SparseModule) -> torch.Tensor:
    weight = sparse.weights[0]
    live, method = weight["live"], sparse.method
    assert isinstance(method, LBC)
    return unpack(live, weight.site.pattern.combinations) if method.by_position else live.bool()


@pytest.mark.ci
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "2:8"])
def test_position_scores_are_combination_scores_under_sgd_with_momentum_and_weight_decay(text: str) -> None:
    by_position, by_combination = (start(nm.LBC(scores=s, t_f=0.9), text, STEPS) for s in ("position", "combination"))
    table = nm.pattern.combination_table(Pattern.parse(text)).double()
    previous = live_bits(by_position[0]).clone()
    for step in range(STEPS):
        losses = [train(*run, seed=step) for run in (by_position, by_combination)]
        live, other = live_bits(by_position[0]), live_bits(by_combination[0])
        assert torch.equal(live, other), f"live sets differ after step {step + 1}"
        assert not bool((live & ~previous).any()), "a retired combination came back"
        expected = by_position[0].method.live_count(by_position[0].plan.sites[0], step + 1, STEPS)
        assert bool((live.sum(-1) == expected).all())
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-9)
        if expected > 1:
            positions = by_position[0].weights[0]["scores"].detach().view(16, -1, table.shape[1])
            combined = by_combination[0].weights[0]["scores"].detach()
            difference = ((positions @ table.T) - combined)[live].abs().max()
            assert float(difference) <= 1e-9
        previous = live.clone()
    assert bool((previous.sum(-1) == 1).all())


@pytest.mark.parametrize("text", ["1:2", "2:4", "4:8", "2:8", "1:16", "4:16"])
@pytest.mark.parametrize(("t_i", "t_f"), [(0.0, 0.5), (0.2, 0.7), (0.0, 1.0)])
def test_the_schedule_is_the_papers_cubic_with_its_ceil_taken_exactly(text: str, t_i: float, t_f: float) -> None:
    pattern = Pattern.parse(text)
    site = Site("w", "linear", (16, 16), Layout(1, 0), pattern)
    method, total = nm.LBC(t_i=t_i, t_f=t_f), 600
    begin, end = round(t_i * total), round(t_f * total)
    for step in range(total + 1):
        tau = min(max(Fraction(step - begin, end - begin), Fraction(0)), Fraction(1))
        assert method.live_count(site, step, total) == 1 + math.ceil((pattern.combinations - 1) * (1 - tau) ** 3)
    assert method.live_count(site, begin, total) == pattern.combinations
    assert method.live_count(site, end - 1, total) > method.live_count(site, end, total) == 1


def test_training_starts_dense_and_ends_exactly_n_of_m() -> None:
    sparse, scheduler, optimizer = start(nm.LBC(), "2:4", 40)
    weight = sparse.weights[0]
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), dense(sparse.origin, x), rtol=0, atol=0)
    for step in range(20):
        assert not sparse.method.is_settled(weight)
        train(sparse, scheduler, optimizer, step)
    assert sparse.method.is_settled(weight)
    assert nm.report(sparse).to_dict()["weights"][1]["nonzero"] == 0.5


def test_scores_stop_training_at_t_f_and_nothing_moves_the_mask_afterwards() -> None:
    sparse, scheduler, optimizer = start(nm.LBC(), "2:4", 40)
    weight = sparse.weights[0]
    for step in range(20):
        assert weight["scores"].requires_grad
        train(sparse, scheduler, optimizer, step)
    assert not weight["scores"].requires_grad
    scores, live = weight["scores"].clone(), weight["live"].clone()
    for step in range(20, 40):
        train(sparse, scheduler, optimizer, step)
    assert torch.equal(weight["scores"], scores)
    assert torch.equal(weight["live"], live)


def test_a_decided_group_gets_a_zero_score_gradient_even_where_scores_still_require_one() -> None:
    sparse, scheduler, optimizer = start(nm.LBC(), "2:4", 40)
    for step in range(20):
        train(sparse, scheduler, optimizer, step)
    scores = sparse.weights[0]["scores"].requires_grad_()  # as it stays under DDP, whose reducer counts gradients
    sparse(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
    assert scores.grad is not None
    assert not bool(scores.grad.any())


@pytest.mark.ci(here=["2:4-", "4:8-"])
@pytest.mark.parametrize(
    ("text", "numbers", "bytes_a_group"), [("2:4", 4, 1), ("1:4", 4, 1), ("2:8", 8, 4), ("4:8", 8, 9), ("1:16", 16, 2)]
)
def test_the_position_layout_costs_m_numbers_and_c_bits_a_group(text: str, numbers: int, bytes_a_group: int) -> None:
    model = nn.Linear(64, 32)
    sparse = nm.compile(model, torch.randn(2, 64), pattern=text, method=nm.LBC(), include="*")
    weight = sparse.weights[0]
    groups = 32 * weight.site.groups_per_row
    assert weight["scores"].numel() == groups * numbers == model.weight.numel()
    assert weight["live"].numel() * weight["live"].element_size() == groups * bytes_a_group
    twin = nm.compile(nn.Linear(64, 32), torch.randn(2, 64), pattern=text, method=nm.LBC(scores="combination"), include="*")
    assert twin.weights[0]["scores"].numel() == groups * Pattern.parse(text).combinations


def test_where_combinations_are_too_many_positions_retire_instead() -> None:
    torch.manual_seed(0)
    model = MLP(32)
    sparse = nm.compile(model, example(model), pattern={"fc2*": "8:16"}, method=nm.LBC(), include="fc2*")
    weight = sparse.weights[0]
    assert weight["live"].shape == (32, 2, 16)
    scheduler = nm.SparsityScheduler(sparse, total_steps=20)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    seen = []
    for _ in range(12):
        sparse(torch.randn(8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seen.append(count(weight["live"], packed=False).unique().tolist())
    expected = [8 + math.ceil(Fraction(8) * (1 - Fraction(min(step, 10), 10)) ** 3) for step in range(1, 13)]
    assert seen == [[k] for k in expected]
    assert set(nm.verify(nm.freeze(sparse), "8:16").satisfied) == {"fc2.weight"}


@pytest.mark.ci(here=["2:3", "position-3:4"])
@pytest.mark.parametrize("text", ["1:2", "2:3", "3:4", "7:8"])
@pytest.mark.parametrize("layout", ["position", "combination"])
def test_where_there_are_as_many_combinations_as_positions_the_lowest_scored_still_goes(text: str, layout: Any) -> None:
    pattern = Pattern.parse(text)
    model = nn.Linear(4 * pattern.m, 6)
    sparse = nm.compile(model, torch.randn(2, 4 * pattern.m), pattern=text, method=nm.LBC(scores=layout), include="*")
    weight = sparse.weights[0]
    with torch.no_grad():
        weight["scores"].copy_(torch.rand(weight["scores"].shape))
    scores = weight["scores"].detach().view(6, 4, -1).clone()
    kept = nm.freeze(sparse, finish=True).weight.view(6, 4, pattern.m) != 0
    table = nm.pattern.combination_table(pattern).float()
    best = (scores @ table.T if layout == "position" else scores).argmax(-1)
    assert torch.equal(kept, table[best].bool())


@pytest.mark.ci
def test_every_method_trains_under_adam_with_gradient_clipping() -> None:
    for method in (nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(interval=3), nm.SRSTE(), nm.Magnitude()):
        torch.manual_seed(0)
        model = MLP(16)
        sparse = nm.compile(model, example(model), method=method)
        optimizer, scheduler = torch.optim.AdamW(sparse.parameters(), lr=1e-2), nm.SparsityScheduler(sparse, total_steps=60)
        x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
        losses = []
        for _ in range(60):
            loss = nn.functional.cross_entropy(sparse(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(float(loss))
        assert losses[-1] < 0.7 * losses[0]
        assert set(nm.verify(nm.freeze(sparse)).satisfied) == {"fc2.weight"}


class PartlyFrozen(nn.Module):
    """A part runs without gradients, another not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.frozen, self.unused = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).relu()
        with torch.no_grad():
            z = self.frozen(y) if self.training else self.unused(self.frozen(y))
        return self.head(self.layer(y).relu() + z)


@pytest.mark.ci
@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
@pytest.mark.parametrize("scores", ["position", "combination"])
def test_a_weight_that_no_gradient_reaches_keeps_its_largest(scores: Any, live: bool) -> None:
    torch.manual_seed(1)
    x, method = torch.randn(16, 8), nm.LBC(scores=scores)
    sparse = (
        nm.compile(PartlyFrozen(), method=method, then="eager") if live else nm.compile(PartlyFrozen(), (x,), method=method)
    )
    sparse.eval()(x)
    sparse.train()(x)
    scheduler = nm.SparsityScheduler(sparse, total_steps=12)
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse, weight_decay=1e-2), lr=0.1, momentum=0.9)
    largest = {
        n: magnitude_mask(p.detach(), 2, 4, 1) for n, p in sparse.named_parameters() if n in ("frozen.weight", "unused.weight")
    }
    for _ in range(12):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model = nm.freeze(sparse)
    assert len(largest) == 2
    for name, mask in largest.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name


@pytest.mark.parametrize("cast", ["before", "after"])
def test_scores_of_a_model_in_bfloat16_move_under_small_steps(cast: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    x = torch.randn(32, 16, dtype=torch.bfloat16)
    if cast == "before":
        sparse = nm.compile(model.to(x.dtype), (x,), method=nm.LBC())
    else:  # as Lightning's "bf16-true" does
        sparse = nm.compile(model, (x.float(),), method=nm.LBC()).to(x.dtype)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-4)
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    for _ in range(4):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    scores = sparse.weights[0]["scores"]
    assert scores.dtype == torch.bfloat16
    assert float((scores != scores[0, 0]).float().mean()) > 0.9
    (row,) = (row for row in nm.report(sparse).rows if row.status == "sparse")
    assert "never moved" not in row.reason
