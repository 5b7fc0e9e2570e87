# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""A live model under FSDP2, two gloo processes: what one process trains, in shards; what cannot be in shards says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_two
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import nm_compiler as nm
from nm_compiler.carrier import carrier_of
from nm_compiler.integrations.fsdp import state_as_parameters
from nm_compiler.state.sharding import cut_like, whole

STEPS = 6
METHODS = {
    "LBC": nm.LBC(),
    "BiMask": nm.BiMask(interval=2, moves=40),
    "SRSTE": nm.SRSTE(),
}
MORE = {
    "LBC-combination": nm.LBC(scores="combination"),
    "LBCBiMask": nm.LBCBiMask(backward=nm.BiMask(interval=2, moves=40)),
    "decoupled": nm.SRSTE(decoupled=True),
    "Gradual": nm.Gradual(),
    "Transposable": nm.Transposable(),
}
SPARSE = {f"blocks.{i}.{leaf}.weight" for i in range(2) for leaf in ("up", "down")} | {"right.weight", "odd.weight"}


class Block(nn.Module):
    """Two equal ones share their code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Right(nn.Module):
    """A weight [in, out]: shards of its first axis cut through groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 4)) @ self.weight


class Net(nn.Module):
    """Blocks, a product from the right, and nine rows, which two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.right = Right()
        self.odd, self.head = nn.Linear(12, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(self.odd(torch.relu(self.right(x)))))


def batches(rank: int | None) -> Tensor:
    """[step, row, 8]: all rows, or those of a rank."""
    data = torch.randn(STEPS, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return data if rank is None else data[:, 3 * rank : 3 * rank + 3]


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def made(method: Any, rank: int | None, then: str = "eager", parameters: bool = True) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    combinations = getattr(method, "scores", "") == "combination"  # their axis has to be known before the first call
    model = nm.compile(Net().double(), method=method, then=then, exclude=("right.weight",) if combinations else ())
    model(batches(rank)[0])  # now the plan is there
    if rank is not None:
        sharded(state_as_parameters(model) if parameters else model)
    optimizer = torch.optim.SGD(nm.parameter_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
    return model, optimizer, nm.SparsityScheduler(model, total_steps=STEPS, optimizer=optimizer)


def train(parts: tuple[nn.Module, Any, Any], rank: int | None, steps: range) -> list[tuple[float, dict[str, Tensor]]]:
    model, optimizer, scheduler = parts
    history = []
    for x in batches(rank)[steps.start : steps.stop]:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(x)  # what is evaluated between the steps leaves the root's weights whole
        scheduler.step()
        value = loss.detach()
        if rank is not None:
            torch.distributed.all_reduce(value)
            value /= 2
        history.append((float(value), {name: whole(state).clone() for name, state in model.state_dict().items()}))
    return history


def same(history: list[tuple[float, dict[str, Tensor]]], alone: list[tuple[float, dict[str, Tensor]]]) -> None:
    assert len(history) == len(alone)
    for step, ((loss, state), (expected, its)) in enumerate(zip(history, alone, strict=True)):
        assert loss == pytest.approx(expected, rel=1e-9), step
        assert state.keys() == its.keys()
        for name, value in its.items():
            if not value.is_floating_point():  # live sets, masks, orders
                assert torch.equal(state[name], value), (name, step)
            elif not name.endswith("_scores"):  # which no mask reads after t_f
                torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12, msg=f"{name}, step {step}")


def summary(model: nn.Module) -> tuple[list[Any], set[str]]:
    rows = [(r.name, r.status, r.reason, r.retained, r.backward_kept, r.live, r.nonzero) for r in nm.report(model).rows]
    return rows, set(nm.verify(model).satisfied)


# -- what the ranks do --------------------------------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(nm.NMError) as caught:
        call()
    return str(caught.value)


def trained(method: Any, rank: int, folder: str, **options: Any) -> dict[str, Any]:
    parts = made(method, rank, **options)
    history = train(parts, rank, range(STEPS))
    model = parts[0]
    rows = {name: value.to_local().shape[0] for name, value in model.state_dict().items() if hasattr(value, "to_local")}
    freeze = refusal(lambda: nm.freeze(model))
    save = refusal(lambda: nm.save_checkpoint(f"{folder}/never.pt", model=model))
    late = refusal(lambda: state_as_parameters(model))
    return {"history": history, "summary": summary(model), "rows": rows, "refused": (freeze, save, late)}


def checkpoints(rank: int, folder: str) -> dict[str, Any]:
    """Go on from what one process saved; and save for one process."""
    parts = made(nm.LBC(), rank)
    load(parts, f"{folder}/of_one")
    history = train(parts, rank, range(2, 4))
    save(parts, f"{folder}/of_two")
    return {"history": history}


def save(parts: tuple[nn.Module, Any, Any], folder: str) -> None:
    model, optimizer, scheduler = parts
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}, checkpoint_id=folder)


def load(parts: tuple[nn.Module, Any, Any], folder: str) -> None:
    model, optimizer, scheduler = parts
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def in_bfloat16(rank: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nm.compile(Net(), method=nm.SRSTE(), then="aot_eager")
    x = batches(rank).float()
    model(x[0])
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for each in x[:2]:
        model(each).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    satisfied = set(nm.verify(model).satisfied)
    model.blocks[0].unshard()
    gathered, _ = carrier_of(model).masked("blocks.0.up.weight")
    return {"satisfied": satisfied, "gathered": gathered, "kept": whole(model.state_dict()["odd.weight"])}


def from_meta(rank: int, folder: str) -> dict[str, Any]:
    """Planned without values, sharded, given memory, and only then loaded: no rank ever holds the whole model."""
    with torch.device("meta"):
        model = nm.compile(Net().double(), method=nm.LBC(), then="eager")
        model(torch.empty(3, 8, dtype=torch.float64))
    sharded(state_as_parameters(model)).to_empty(device="cpu")
    torch.manual_seed(0)
    dense = Net().double().state_dict()
    model.load_state_dict({name: cut_like(value, model.get_parameter(name)) for name, value in dense.items()})
    optimizer = torch.optim.SGD(nm.parameter_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
    parts = (model, optimizer, nm.SparsityScheduler(model, total_steps=STEPS, optimizer=optimizer))
    return {"history": train(parts, rank, range(STEPS))}


def too_early(rank: int, folder: str) -> dict[str, Any]:
    model = sharded(nm.compile(Net().double(), method=nm.SRSTE(), then="eager"))
    return {"first": refusal(lambda: model(batches(rank)[0])), "late": refusal(lambda: late(rank))}


def late(rank: int) -> None:
    """Evaluation reads a weight that the first call did not, behind all others."""
    model = Forked().double()
    nm.compile(model, method=nm.LBC(), then="eager", exclude=("head.weight",))
    model(batches(rank)[0])
    fully_shard(model)
    model.eval()(batches(rank)[0])


class Forked(nn.Module):
    """What is unread in training is multiplied with its own transpose in evaluation, and so stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.middle(self.stem(x)))
        return x if self.training else x + self.other.weight.exp().sum()


def tensor_parallel(rank: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, found = init_device_mesh("cpu", (2,)), {}
    columns, rows = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    cases = {"columns": ("up", columns), "rows": ("down", rows), "whole": ("up", rows), "dense": ("up", columns)}
    for case, (leaf, style) in cases.items():
        exclude = f"blocks.0.{leaf}.weight" if case == "dense" else ()
        model = nm.compile(Net().double(), method=nm.LBC(), then="eager", exclude=exclude)
        model(batches(None)[0])
        parallelize_module(model, mesh, {f"blocks.0.{leaf}": style})
        found[case] = refusal(partial(model, batches(None)[0]))
    return found


def worker(rank: int, folder: str, jobs: dict[str, tuple[Callable[..., Any], dict[str, Any]]]) -> None:
    for name, (job, options) in jobs.items():
        torch._dynamo.reset()  # which looks through what it compiled for other models
        torch.save(job(rank=rank, folder=folder, **options), f"{folder}/{name}.{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What both ranks found, all of it in one pair of processes."""
    place = tmp_path_factory.mktemp("ranks")
    parts = made(nm.LBC(), None)
    train(parts, None, range(2))
    save(parts, f"{place}/of_one")
    jobs = {name: (trained, {"method": method}) for name, method in METHODS.items()}
    slow = (in_bfloat16, from_meta) if request.config.getoption("--slow") else ()
    more = (checkpoints, too_early, tensor_parallel, *slow)
    run_two(worker, str(place), jobs | {job.__name__: (job, {}) for job in more})
    return place


def both(folder: Path, name: str) -> tuple[Any, Any]:
    return tuple(torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in (0, 1))


@pytest.mark.ci
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_in_shards_train_what_one_process_does(name: str, folder: Path) -> None:
    parts = made(METHODS[name], None)
    alone = train(parts, None, range(STEPS))
    for found in both(folder, name):
        same(found["history"], alone)
        rows, satisfied = found["summary"]
        expected, _ = summary(parts[0])
        assert satisfied == SPARSE
        for row, its in zip(rows, expected, strict=True):
            assert row[:3] == its[:3]
            for number, expected_number in zip(row[3:], its[3:], strict=True):
                assert number == (None if expected_number is None else pytest.approx(expected_number, rel=1e-9))


@pytest.mark.ci
@pytest.mark.parametrize("name", ["LBC", "BiMask"])
def test_state_is_cut_with_its_weight_also_where_rows_do_not_divide_by_the_ranks(name: str, folder: Path) -> None:
    first, second = (found["rows"] for found in both(folder, name))
    assert (first["odd.weight"], second["odd.weight"]) == (5, 4)
    state = [key for key in first if key.endswith(("_scores", "_live", "_order"))]
    assert len(state) == (12 if name == "LBC" else 5)  # nine rows have no backward groups
    for key in state:
        weight = key.rpartition("_")[0]
        if weight != "right.weight":
            assert (first[key], second[key]) == (first[weight], second[weight]), key


@pytest.mark.ci
def test_a_sharded_checkpoint_goes_from_one_process_to_two_and_back_with_its_optimizer(folder: Path) -> None:
    alone = train(made(nm.LBC(), None), None, range(STEPS))
    for found in both(folder, "checkpoints"):
        same(found["history"], alone[2:4])
    parts = made(nm.LBC(), None)
    load(parts, f"{folder}/of_two")
    same(train(parts, None, range(4, STEPS)), alone[4:])
    assert set(nm.verify(nm.freeze(parts[0])).satisfied) == SPARSE  # the way out that a freeze in shards names


@pytest.mark.slow
def test_a_model_planned_on_the_meta_device_is_loaded_in_shards_and_trains_the_same(folder: Path) -> None:
    alone = train(made(nm.LBC(), None), None, range(STEPS))
    for found in both(folder, "from_meta"):
        same(found["history"], alone)


@pytest.mark.slow
def test_gathered_bfloat16_weights_are_exactly_two_of_four(folder: Path) -> None:
    for found in both(folder, "in_bfloat16"):
        assert found["satisfied"] == SPARSE
        assert found["kept"].dtype == torch.float32
        assert found["gathered"].dtype == torch.bfloat16
        assert ((found["gathered"] != 0).view(20, 4, 4).sum(-1) == 2).all()


@pytest.mark.ci
def test_what_cannot_be_in_shards_is_refused_with_the_way_out(folder: Path) -> None:
    for found in both(folder, "LBC"):
        freeze, saving, late = found["refused"]
        assert freeze.startswith(
            "blocks.0.up.weight of shape [20, 16] is in shards, and nm.freeze writes whole weights: save with"
        )
        assert saving.endswith(
            "stem.weight of model= is in shards. Save with torch.distributed.checkpoint, which writes those of all ranks"
        )
        assert late == "fully_shard was called on this FSDPNet already: state_as_parameters(model) comes before it"
    for found in both(folder, "too_early"):
        assert found["first"].startswith("this FSDPNet was in shards before its first call, which plans it: run one batch")
        assert found["late"].startswith("other.weight: read for the first time now and stays dense, but fully_shard holds")
    for found in both(folder, "tensor_parallel"):
        up, down = "blocks.0.up.weight of shape [20, 16] is", "blocks.0.down.weight of shape [16, 20] is"
        assert found["columns"].startswith(
            f"{up} tensor-parallel, ['S(0)']: cut not along its inputs, groups of 4 stay whole;"
        )
        assert found["rows"].startswith(
            f"{down} tensor-parallel, ['S(1)']: cut along its 20 inputs over 2 ranks, through groups"
        )
        assert found["whole"].startswith(
            f"{up} tensor-parallel, ['S(1)']: cut along its 16 inputs over 2 ranks, groups of 4 stay"
        )
        assert found["dense"].startswith(f"{up} tensor-parallel, ['S(0)']: graphs over parts are not rewritten. Leave")


def test_state_becomes_parameters_only_on_a_live_model_that_has_run() -> None:
    with pytest.raises(nm.NMError, match="Net is not a live model: FSDP2 needs what nm.compile"):
        state_as_parameters(Net())
    model = nm.compile(Net(), method=nm.LBC(), then="eager")
    with pytest.raises(nm.NMError, match="has not run since nm.compile"):
        state_as_parameters(model)


@pytest.mark.slow
def test_more_methods_and_compilers_and_buffers_left_whole_train_what_one_process_does(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {name: {"method": method} for name, method in MORE.items()}
    cases |= {f"whole-{name}": {"method": method, "parameters": False} for name, method in METHODS.items()}
    cases |= {then: {"method": MORE["LBCBiMask"], "then": then} for then in ("aot_eager", "inductor")}
    run_two(worker, str(tmp_path), {name: (trained, options) for name, options in cases.items()})
    for name, options in cases.items():
        alone = train(made(options["method"], None), None, range(STEPS))
        for found in both(tmp_path, name):
            same(found["history"], alone)
