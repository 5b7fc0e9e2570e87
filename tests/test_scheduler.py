# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""SparsityScheduler: counting, Bi-Mask's searches, saving, and what it refuses."""

from typing import Any

import pytest
import torch
from models import MLP, Grouped, example
from precompiled import precompiled
from torch import Tensor

import nm_compiler as nm
from nm_compiler.state.beside import Weight


def sparse_mlp(method: Any = None, seed: int = 0, width: int = 16) -> nm.SparseModule:
    torch.manual_seed(0)
    model = MLP(width)
    if seed:
        return nm.compile(model, example(model), method=method or nm.LBC(), seed=seed)
    return precompiled(model, method or nm.LBC(), width=width)[0]


def test_epochs_count_calls_of_step_alone_and_optimizer_steps_with_a_length() -> None:
    sparse = sparse_mlp()
    assert nm.SparsityScheduler(sparse, epochs=12).total_steps == 12
    assert nm.SparsityScheduler(sparse, epochs=3, steps_per_epoch=5).total_steps == 15


def test_with_gradient_accumulation_only_optimizer_steps_count() -> None:
    sparse = sparse_mlp()
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for micro in range(1, 9):
        (sparse(torch.randn(4, 8)).square().mean() / 4).backward()
        if micro % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert scheduler.last_step == 2
    assert sparse.method.is_settled(sparse.weights[0])


@pytest.mark.parametrize(
    "length",
    [
        {"total_steps": 0}, {"total_steps": -3}, {"total_steps": 2.5}, {"total_steps": True}, {"epochs": 0},
        {"epochs": 2, "steps_per_epoch": 0}, {}, {"total_steps": 3, "epochs": 3}, {"total_steps": 3, "steps_per_epoch": 2},
    ],
)  # fmt: skip
def test_a_length_that_is_missing_doubled_or_not_positive_is_refused(length: dict[str, Any]) -> None:
    with pytest.raises(nm.NMError, match="total_steps|epoch"):
        nm.SparsityScheduler(sparse_mlp(), **length)


def test_stepping_past_the_end_says_how_long_the_schedule_was() -> None:
    sparse = sparse_mlp()
    scheduler = nm.SparsityScheduler(sparse, total_steps=1)
    scheduler.step()
    live = sparse.weights[0]["live"].clone()
    with pytest.raises(nm.NMError, match="step 2 of 1: the schedule has ended"):
        scheduler.step()
    assert scheduler.last_step == 1
    assert torch.equal(sparse.weights[0]["live"], live)


def test_a_plain_model_has_nothing_to_schedule() -> None:
    with pytest.raises(nm.NMError, match="MLP is not a compiled model: call nm.compile"):
        nm.SparsityScheduler(MLP(), total_steps=3)


def test_the_orders_are_searched_after_the_first_step_and_then_every_interval() -> None:
    calls: list[int] = []

    def search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
        assert importance.shape == (16, 16)
        assert (n, m, moves) == (2, 4, 77)
        calls.append(seed)
        return order.flip(0)

    sparse = sparse_mlp(nm.BiMask(interval=3, moves=77, search=search))
    scheduler = nm.SparsityScheduler(sparse, total_steps=8)
    seen = []
    for _ in range(8):
        scheduler.step()
        seen.append(len(calls))
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3]
    assert len(set(calls)) == 3
    assert sparse.weights[0]["order"].tolist() == list(range(15, -1, -1))


def test_the_search_never_lets_the_backward_share_fall_and_stays_within_conv_groups() -> None:
    model = Grouped()
    sparse = nm.compile(model, example(model), method=nm.BiMask(interval=1, moves=50))
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)

    def shares() -> list[float]:
        return [row.backward_kept for row in nm.report(sparse).rows if row.backward_kept is not None]

    before = shares()
    for _ in range(4):
        scheduler.step()
        after = shares()
        assert all(new >= old - 1e-6 for new, old in zip(after, before, strict=True))
        before = after
    order = model.grouped.weight_order
    assert order[:12].sort().values.tolist() == list(range(12))
    assert not torch.equal(order, torch.arange(24))


def test_the_seed_of_compile_decides_the_orders() -> None:
    orders = []
    for seed in (0, 0, 1):
        sparse = sparse_mlp(nm.BiMask(interval=1, moves=64), seed=seed, width=64)
        scheduler = nm.SparsityScheduler(sparse, total_steps=1)
        scheduler.step()
        orders.append(sparse.weights[0]["order"].clone())
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_the_count_objective_ignores_magnitudes() -> None:
    seen: list[Tensor] = []

    def search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
        seen.append(importance)
        return order

    nm.SparsityScheduler(sparse_mlp(nm.BiMask(objective="count", search=search)), total_steps=1).step()
    assert seen[0].unique().tolist() == [0.0, 1.0]
    assert float(seen[0].mean()) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 20}, "saved with total_steps=20, this scheduler has 10"),
        ({"method": "SRSTE(decay=0.0002)"}, "saved for SRSTE"),
        ({"last_step": 11}, "outside 0 to 10"),
        ({"last_step": None}, "last_step missing"),
    ],
)
def test_the_state_of_another_schedule_is_refused_and_nothing_changes(change: dict[str, Any], message: str) -> None:
    scheduler = nm.SparsityScheduler(sparse_mlp(), total_steps=10)
    scheduler.step()
    state = {key: value for key, value in {**scheduler.state_dict(), **change}.items() if value is not None}
    with pytest.raises(nm.NMError, match=message):
        scheduler.load_state_dict(state)
    assert scheduler.last_step == 1


@pytest.mark.parametrize("method", [nm.LBC(), nm.LBC(scores="combination"), nm.Gradual(), nm.BiMask(), nm.SSTE()], ids=str)
@pytest.mark.parametrize(("done", "before", "after"), [(4, 12, 24), (7, 12, 24), (12, 12, 20), (4, 24, 12), (10, 24, 12)])
def test_a_run_may_become_longer_or_shorter_and_ends_with_exact_masks(
    method: nm.Method, done: int, before: int, after: int
) -> None:
    first, second = sparse_mlp(method), sparse_mlp(method)
    scheduler = nm.SparsityScheduler(first, total_steps=before)
    for _ in range(done):
        stepped(first, scheduler)
    second.load_state_dict(first.state_dict())
    longer, state = nm.SparsityScheduler(second, total_steps=after), scheduler.state_dict()
    with pytest.raises(nm.NMError, match=rf"load \{{\*\*state, 'total_steps': {after}\}}"):
        longer.load_state_dict(state)
    longer.load_state_dict({**state, "total_steps": after})
    kept = [second.masked(weight.site.name)[0] != 0 for weight in second.weights]
    for _ in range(after - done):
        stepped(second, longer)
    ended = [second.masked(weight.site.name)[0] != 0 for weight in second.weights]
    if not isinstance(method, (nm.BiMask, nm.SSTE)):  # these choose anew in every pass
        assert all(bool((now <= then).all()) for now, then in zip(ended, kept, strict=True)), "what is decided stays"
    assert nm.verify(nm.freeze(second), "2:4").satisfied


def stepped(sparse: nm.SparseModule, scheduler: nm.SparsityScheduler) -> None:
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse(example(sparse.origin, batch=4, seed=scheduler.last_step)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


def test_a_state_taken_before_t_f_lets_the_scores_learn_again() -> None:
    sparse = sparse_mlp()
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    early = scheduler.state_dict()
    for _ in range(4):
        scheduler.step()
    assert not sparse.weights[0]["scores"].requires_grad
    scheduler.load_state_dict(early)
    assert sparse.weights[0]["scores"].requires_grad


def test_a_method_prints_the_same_in_every_process() -> None:
    assert (
        str(nm.BiMask()) == "BiMask(interval=100, decay=0.0002, moves=10000, objective='magnitude', search=quick_search, "
        "decoupled=False, fold=False, products='dense', min_tokens=16384)"
    )
    assert "0x" not in str(nm.BiMask(search=lambda *a, **k: a[1]))


def test_of_two_schedulers_of_a_model_that_follow_one_optimizer_only_the_later_counts() -> None:
    model, other = (nm.compile(MLP(), (torch.randn(4, 8),), method=nm.LBC()) for _ in range(2))
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    beside = nm.SparsityScheduler(other, 9).follow(optimizer)
    counted = []
    for length in (1, 2):  # fit() called twice: the first schedule has ended when the second begins
        scheduler = nm.SparsityScheduler(model, length).follow(optimizer)
        for _ in range(length):
            (model(torch.randn(4, 8)).sum() + other(torch.randn(4, 8)).sum()).backward()
            optimizer.step()
        counted.append(scheduler)
    assert [scheduler.last_step for scheduler in counted] == [1, 2]
    assert beside.last_step == 3


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_scheduler_that_follows_an_optimizer_steps_by_itself_and_only_after_real_steps(fused: bool) -> None:
    followed, called = (nm.compile(MLP(), (torch.randn(4, 8),), method=nm.LBC()) for _ in range(2))
    called.load_state_dict(followed.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, fused=fused) for model in (followed, called)]
    schedules = [nm.SparsityScheduler(followed, 6).follow(optimizers[0]), nm.SparsityScheduler(called, 6)]
    scaler = torch.amp.GradScaler("cpu")
    for step in range(5):
        x = torch.randn(4, 8)
        for model in (followed, called):
            loss = model(x).square().mean()
            (scaler.scale(loss) if model is followed else loss).backward()
        if step == 2:
            followed.fc2.weight.grad.fill_(float("inf"))
        else:
            optimizers[1].step()
            schedules[1].step()
        scaler.step(optimizers[0])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert schedules[0].last_step == schedules[1].last_step == 4
    assert torch.equal(followed.fc2.weight_live, called.fc2.weight_live)
    with pytest.raises(nm.NMError, match="follows an optimizer already"):
        schedules[0].follow(optimizers[0])
    with pytest.raises(nm.NMError, match="fc2.weight_scores"):
        nm.SparsityScheduler(called, 6).follow(torch.optim.SGD([called.fc1.weight], lr=0.1))


class TwoParts(torch.optim.Optimizer):
    """Steps as SAM does: to a worse place, and from there; loops call the two by themselves."""

    def __init__(self, parameters: Any, base: Any, **options: Any) -> None:
        super().__init__(parameters, options)
        self.base_optimizer = base(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["before"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.01)

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["before"])
        self.base_optimizer.step()

    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("whole", [False, True])
def test_a_scheduler_follows_an_optimizer_that_loops_step_in_two_parts(whole: bool) -> None:
    sparse = nm.compile(MLP(), (torch.randn(4, 8),), method=nm.SRSTE())
    optimizer = TwoParts(sparse.parameters(), torch.optim.SGD, lr=0.1)
    scheduler = nm.SparsityScheduler(sparse, 3).follow(optimizer)
    x = torch.randn(4, 8)

    def backward() -> None:
        optimizer.zero_grad()
        sparse(x).square().mean().backward()

    for _ in range(3):
        if whole:
            optimizer.step(backward)
            continue
        backward()
        optimizer.first_step()
        backward()
        optimizer.second_step()
    assert scheduler.last_step == 3


def test_scores_that_step_less_often_than_weights_need_the_optimizer_that_holds_them() -> None:
    told = []
    for given in (False, True):
        sparse = sparse_mlp()
        scores = [p for name, p in sparse.named_parameters() if name.endswith("_scores")]
        weights = [p for name, p in sparse.named_parameters() if not name.endswith("_scores")]
        often, seldom = torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(scores, lr=0.1)
        scheduler = nm.SparsityScheduler(sparse, total_steps=4, optimizer=seldom if given else None)
        try:
            for step in range(4):
                sparse(example(sparse.origin)).sum().backward()
                often.step()
                if step % 2:
                    seldom.step()
                scheduler.step()
        except nm.NMError as error:
            told.append(str(error))
            continue
        assert nm.verify(nm.freeze(sparse)).satisfied == {"fc2.weight": (1,)}
    assert len(told) == 1
    assert "or did not step" in told[0]
    assert "give SparsityScheduler(optimizer=) the one that holds them" in told[0]


def test_scores_are_refused_in_an_optimizer_that_orthogonalises_matrices() -> None:
    sparse = sparse_mlp()
    groups = {group["name"]: group["params"] for group in nm.parameter_groups(sparse)}
    both = torch.optim.Muon([*groups["weights"], *groups["scores"]])
    with pytest.raises(nm.NMError, match=r"Muon holds .*_scores.*, and orthogonalises matrices"):
        nm.SparsityScheduler(sparse, total_steps=4, optimizer=both)

    class MuonWithAdam(torch.optim.SGD):
        """As those of others: some groups are Adam's."""

    aside = {"params": [*groups["scores"], *groups["others"]]}
    for mark in ({"use_muon": True}, {}):
        with pytest.raises(nm.NMError, match=r"MuonWithAdam holds .*_scores.*, and orthogonalises matrices"):
            nm.SparsityScheduler(sparse, 4, optimizer=MuonWithAdam([{**aside, **mark}], lr=0.1))
    for mark in ({"use_muon": False}, {"use_fallback": True}):
        nm.SparsityScheduler(sparse, 4, optimizer=MuonWithAdam([{**aside, **mark}], lr=0.1))
    weights, others = torch.optim.Muon(groups["weights"]), torch.optim.AdamW([*groups["scores"], *groups["others"]])
    scheduler = nm.SparsityScheduler(sparse, total_steps=4, optimizer=others)
    sparse(torch.randn(4, 8)).square().mean().backward()
    weights.step(), others.step()
    scheduler.step()


@pytest.mark.parametrize("method", [nm.LBC(), nm.Gradual()], ids=lambda method: method.name)
def test_what_an_interrupted_step_has_left_undecided_is_decided_in_the_next(
    method: nm.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = sparse_mlp(method)
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    scheduler.step()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Weight, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduler.step()  # at which masks were to be decided
    assert not method.is_settled(sparse.weights[0])
    scheduler.step()
    assert scheduler.last_step == 3
    assert method.is_settled(sparse.weights[0])


@pytest.mark.parametrize("method", [nm.LBC(t_f=1.0), nm.Gradual(t_f=1.0)], ids=lambda method: method.name)
def test_the_last_step_that_was_interrupted_is_finished_by_one_more_call_which_counts_nothing(
    method: nm.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = sparse_mlp(method)
    scheduler = nm.SparsityScheduler(sparse, total_steps=2)
    scheduler.step()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Weight, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduler.step()
    with pytest.raises(nm.NMError, match=r"Or the last step\(\) was interrupted: call it once more"):
        nm.freeze(sparse)
    scheduler.step()
    assert scheduler.last_step == 2
    with pytest.raises(nm.NMError, match="the schedule has ended"):
        scheduler.step()
    nm.freeze(sparse)


def test_an_optimizer_that_orthogonalises_scores_is_found_out_in_its_first_step() -> None:
    class Scion(torch.optim.SGD):
        """As those of others: a norm for each group."""

    def first_step(optimizer: torch.optim.Optimizer) -> None:
        scheduler = nm.SparsityScheduler(sparse, total_steps=4)
        sparse(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()

    sparse = sparse_mlp()
    groups = {group["name"]: group["params"] for group in nm.parameter_groups(sparse)}
    matrices = [*groups["weights"], *groups["scores"]]
    kinds: list[Any] = [
        lambda: torch.optim.Muon(matrices),
        lambda: Scion([{"params": matrices}], lr=0.1, momentum=0.9),
        lambda: Scion([{"params": matrices, "norm_type": 2}], lr=0.1, momentum=0.9),
    ]
    for make in kinds:
        with pytest.raises(nm.NMError, match=r"holds .*_scores.*, and orthogonalises matrices.* del it"):
            first_step(make())
    first_step(Scion([{"params": matrices, "norm_type": 4}], lr=0.1, momentum=0.9))
    first_step(torch.optim.AdamW(matrices))
