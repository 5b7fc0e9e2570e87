# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Data-parallel training over two gloo processes, across t_f."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, example
from ranks import in_company, run_two
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.integrations.schedules import Schedules

STEPS = 12


def worker(rank: int, method: Any, out: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    sparse = nm.compile(model, example(model), method=method)
    torch.manual_seed(1 + rank)  # ranks draw differently from here on
    parallel = nn.parallel.DistributedDataParallel(sparse)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = nm.SparsityScheduler(parallel, total_steps=STEPS)
    history: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        x = example(model, batch=3 + rank, seed=10 * step + rank)
        parallel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        history.append({name: value.clone() for name, value in sparse.state_dict().items() if "running" not in name})
    if isinstance(method, nm.LBC):
        assert sparse.weights[0]["scores"].requires_grad, "flipping it would break the reducer"
    reloaded = nm.compile(ConvNet(), example(model), method=method)
    nn.parallel.DistributedDataParallel(reloaded).load_state_dict(parallel.state_dict())
    nm.freeze(parallel)
    torch.save({"history": history, "frozen": model.state_dict()}, f"{out}.{rank}")


@pytest.mark.ci
@pytest.mark.parametrize("method", [nm.LBC(t_f=0.5), nm.BiMask(interval=4, moves=40)], ids=["LBC", "BiMask"])
def test_two_processes_agree_on_weights_masks_and_orders_at_every_step_across_t_f(method: Any, tmp_path: Path) -> None:
    run_two(worker, method, str(tmp_path / "out"))
    first, second = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    for step, (one, two) in enumerate(zip(first["history"], second["history"], strict=True)):
        for name, value in one.items():
            assert torch.equal(value, two[name]), f"{name} differs between the ranks after step {step + 1}"
    last = first["history"][-1]
    if isinstance(method, nm.LBC):
        assert not torch.equal(first["history"][0]["conv1.weight_live"], last["conv1.weight_live"])
    else:
        assert not torch.equal(last["conv1.weight_order"], torch.arange(8)), "no order was searched"
    assert set(nm.verify(first["frozen"]).satisfied) == {"conv1.weight", "conv2.weight"}


def test_of_two_processes_only_the_first_writes_rows_of_telemetry() -> None:
    written = list[int]()

    def note(row: Any) -> None:
        written.append(torch.distributed.get_rank())

    for rank in (0, 1):
        with in_company(rank):
            schedules = Schedules(nm.compile(MLP(), (torch.randn(4, 8),)), 4, every=1, write=note)
            telemetry = schedules.tracked[0].telemetry
            schedules.step()
            assert telemetry is not None
            assert telemetry.last_step == 1  # counted, and measured, by both
    assert written == [0]


def test_scores_that_stopped_before_the_processes_met_stay_as_they_are() -> None:
    sparse = nm.compile(MLP(), (torch.randn(4, 8),), method=nm.LBC())
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_step": 3})
    with in_company():  # DistributedDataParallel, made now, knows nothing of them: it would not take their mean
        scheduler.step()
        assert not sparse.fc2.weight_scores.requires_grad


class Gathers(nn.Module):
    """A contrastive loss's features: those of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.three(self.two(self.one(x)))
        if torch.distributed.is_initialized():
            parts = [torch.empty_like(h) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, h)
            h = torch.cat(parts)
        return h


def test_a_model_that_asks_for_other_processes_is_captured_after_they_have_met() -> None:
    x = torch.randn(4, 8)
    sparse, plain = nm.compile(Gathers(), (x,)), nm.compile(MLP(), (x,))
    for each in (sparse, plain, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        each(x)
    with in_company():
        for each in (
            sparse,
            copy.deepcopy(sparse),
            pickle.loads(pickle.dumps(sparse)),
            torch.compile(sparse, backend="eager"),
        ):
            with pytest.raises(
                nm.NMError, match=r"asks torch.distributed for the other processes .*test_ddp.py:\d+.*Call init_pr"
            ):
                each(x)
        assert plain(x).shape == (4, 4)
        assert nm.compile(Gathers(), (x,))(x).shape == (8, 8)
