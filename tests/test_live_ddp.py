# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""A live model in DistributedDataParallel, two gloo processes: what one process trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP
from ranks import run_two
from torch import nn

import nm_compiler as nm

STEPS = 5


def trained(rank: int | None) -> dict[str, Any]:
    """The state after a few steps; of one process (rank None) on the joined batches."""
    torch.manual_seed(0)
    model = nm.compile(MLP().double(), method=nm.LBC(), then="eager")
    data = torch.randn(STEPS, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = data if rank is None else data[:, 3 * rank : 3 * rank + 3]
    running: Any = model
    if rank is not None:
        early = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(nm.NMError, match=r"fc1.weight, fc3.weight: turns out to stay dense now, but Distributed"):
            early(mine[0])
        del early
        model(mine[0])  # now the plan is there
        running = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = nm.SparsityScheduler(running, total_steps=STEPS)
    for x in mine:
        running(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert nm.report(running).rows[1].runs == STEPS + (rank is not None)
    return {name: value.clone() for name, value in model.state_dict().items()}


def worker(rank: int, out: str) -> None:
    torch.save(trained(rank), f"{out}.{rank}")


@pytest.mark.ci
def test_two_processes_train_what_one_does_and_an_early_wrap_is_an_error(tmp_path: Path) -> None:
    run_two(worker, str(tmp_path / "out"))
    first, second = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    alone = trained(None)
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if not name.endswith("_scores"):  # after t_f they keep their flag, and so their momentum, under DDP
            torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12, msg=name)
