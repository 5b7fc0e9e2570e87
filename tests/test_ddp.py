# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Data-parallel training over two gloo processes, across t_f."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ConvNet, example
from ranks import run_two
from torch import Tensor, nn

import nm_compiler as nm

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
