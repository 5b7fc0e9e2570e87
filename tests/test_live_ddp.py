# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""A live model in DistributedDataParallel, two gloo processes: what one process trains."""

import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP
from ranks import in_company, run_two
from torch import nn

import nm_compiler as nm
from nm_compiler.live import growing

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
        with unittest.mock.patch.object(growing._log, "warning") as said:
            model(mine[0])  # past the wrapper, as a trainer's first validation goes
        assert "fc1.weight, fc3.weight" in said.call_args.args
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
    assert nm.report(running).rows[1].runs == STEPS + 2 * (rank is not None)
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


class Counts(nn.Module):
    """Asks how many processes there are, as what gathers from all of them does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)
        return y * torch.distributed.get_world_size() if torch.distributed.is_initialized() else y


def test_a_model_that_was_called_before_processes_met_asks_for_them_anew() -> None:
    model, x = nm.compile(Counts(), method=nm.SRSTE(), then="eager"), torch.randn(4, 8)
    alone = model(x)
    with in_company():
        torch.testing.assert_close(model(x), 2 * alone)
    torch.testing.assert_close(model(x), alone)
