# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Two gloo processes train what one process trains on the whole batch; one that dies leaves a checkpoint to go on from."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP
from ranks import run_two
from torch import Tensor, nn

import nm_compiler as nm

STEPS, BATCH = 12, 8
METHODS = {
    "LBC": nm.LBC(),
    "LBC-combination": nm.LBC(scores="combination"),
    "BiMask": nm.BiMask(interval=3, moves=40),
    "SRSTE": nm.SRSTE(),
    "LBCBiMask": nm.LBCBiMask(backward=nm.BiMask(interval=3, moves=40)),
}


def parts(method: Any) -> tuple[nm.SparseModule, torch.optim.Optimizer]:
    torch.manual_seed(0)
    sparse = nm.compile(MLP().double(), (torch.randn(4, 8, dtype=torch.float64),), method=method)
    return sparse, torch.optim.SGD(nm.parameter_groups(sparse, weight_decay=1e-4), lr=0.1, momentum=0.9)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """The last of three has three rows: two for the first rank, one for the second."""
    x = torch.randn(BATCH if step % 3 < 2 else 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


def train(
    model: nn.Module, optimizer: Any, scheduler: Any, rank: int, world: int, steps: range
) -> tuple[list[Any], list[float]]:
    history, losses = [], []
    for step in steps:
        x, y = (part.tensor_split(world)[rank] for part in global_batch(step))
        whole = len(global_batch(step)[0])
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") * world / whole  # DDP takes the mean over ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(float(loss.detach()) / world)
        history.append({name: value.clone() for name, value in getattr(model, "module", model).state_dict().items()})
    return history, losses


def worker(rank: int, out: str) -> None:
    for name, method in METHODS.items():
        sparse, optimizer = parts(method)
        parallel = nn.parallel.DistributedDataParallel(sparse)
        scheduler = nm.SparsityScheduler(parallel, total_steps=STEPS)
        torch.save(train(parallel, optimizer, scheduler, rank, 2, range(STEPS)), f"{out}/{name}.{rank}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks found, all methods in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two(worker, str(folder))
    return folder


@pytest.mark.ci
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_with_the_same_global_batch_uneven_last_batches_included(name: str, trained: Path) -> None:
    sparse, optimizer = parts(METHODS[name])
    alone, losses = train(sparse, optimizer, nm.SparsityScheduler(sparse, total_steps=STEPS), 0, 1, range(STEPS))
    (first, one), (second, two) = (torch.load(trained / f"{name}.{rank}") for rank in (0, 1))
    for step in range(STEPS):
        assert one[step] + two[step] == pytest.approx(losses[step], rel=1e-9), step
        for key, value in alone[step].items():
            assert torch.equal(first[step][key], second[step][key]), (step, key)
            if key.endswith("_scores") and step >= STEPS // 2:
                continue  # after t_f: DDP's momentum still moves what nothing reads any more
            if value.is_floating_point():
                torch.testing.assert_close(first[step][key], value, rtol=1e-9, atol=1e-9, msg=f"{key}, step {step}")
            else:  # masks, live sets, orders
                assert torch.equal(first[step][key], value), (step, key)


def dying(rank: int, folder: str) -> None:
    """Every step is saved; in the seventh rank 1 is killed before its backward pass, as a machine that goes away."""
    sparse, optimizer = parts(nm.LBC())
    parallel = nn.parallel.DistributedDataParallel(sparse)
    scheduler = nm.SparsityScheduler(parallel, total_steps=STEPS)
    for step in range(STEPS):
        if step == 6 and rank:
            os._exit(9)
        train(parallel, optimizer, scheduler, rank, 2, range(step, step + 1))
        nm.save_checkpoint(f"{folder}/run.pt", model=sparse, optimizer=optimizer, scheduler=scheduler)


@pytest.mark.ci
def test_a_rank_that_dies_leaves_a_checkpoint_from_which_the_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_two(dying, str(tmp_path))
    sparse, optimizer = parts(nm.LBC())
    scheduler = nm.SparsityScheduler(sparse, total_steps=STEPS)
    nm.load_checkpoint(tmp_path / "run.pt", model=sparse, optimizer=optimizer, scheduler=scheduler)
    assert scheduler.last_step in (5, 6)
    resumed, _ = train(sparse, optimizer, scheduler, 0, 1, range(scheduler.last_step, STEPS))
    other, its = parts(nm.LBC())
    whole, _ = train(other, its, nm.SparsityScheduler(other, total_steps=STEPS), 0, 1, range(STEPS))
    for name, value in whole[-1].items():
        torch.testing.assert_close(resumed[-1][name], value, rtol=1e-9, atol=1e-9, msg=name)
