"""Two training steps of one model of the zoo through ``nm.compile(model)``, and what has to hold after them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from reach import histogram
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from workers import Row
from zoo import Entry, seeded

import nm_compiler as nm
from nm_compiler.live.prepared import Prepared
from nm_compiler.unwrapping import unwrap

METHODS: dict[str, Callable[[], nm.Method]] = {"LBC": nm.LBC, "BiMask": lambda: nm.BiMask(interval=1, moves=8)}
STEPS = 2


def train(entry: Entry, *, method: str, then: str) -> Iterator[Row]:
    """Train two steps, in parts as they are known. Raises AssertionError for what does not hold, and what training raises.

    Every planned weight runs sparse in every step and gets finite gradients, scores too, and is N:M to the zero when frozen.
    The frozen model computes in training mode what the live one computed: nothing ran dense.
    """
    model, args, kwargs = seeded(entry.small)
    every_layer_runs(model.train())
    start = time.perf_counter()
    live = nm.compile(model, method=METHODS[method](), then=then)
    optimizer = torch.optim.SGD(live.parameters(), lr=1e-3, momentum=0.9)
    scheduler = nm.SparsityScheduler(live, total_steps=2 * STEPS, optimizer=optimizer)
    yield {"compile_seconds": time.perf_counter() - start}
    counters.clear()
    torch._dynamo.config.use_numpy_random_stream = (
        True  # else what numpy draws in a fragment is not what the frozen model draws
    )
    before: dict[str, int] = {}
    for step in range(STEPS):
        start = time.perf_counter()
        loss = sum(value.float().square().mean() for value in outputs(live, args, kwargs, seed=step))
        assert isinstance(loss, Tensor), "no output of the model has a gradient"
        loss.backward()
        if step == 0:
            yield from first(live, time.perf_counter() - start)
        runs = {row.name: row.runs or 0 for row in nm.report(live).rows if row.status == "sparse"}
        still = [name for name in runs if runs[name] <= before.get(name, 0)]
        assert loss.isfinite(), f"step {step}: the loss is {float(loss)}"
        assert not still, f"step {step}: did not run: {still}"
        check_gradients(live, step)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        before = runs
    yield {"step_seconds": time.perf_counter() - start, "fragments": len(carried(live).live.pieces)}
    expected = outputs(live, args, kwargs, seed=STEPS)
    yield {"difference": frozen_difference(live, expected, args, kwargs, exact=then != "inductor")}


def every_layer_runs(model: nn.Module) -> None:
    """No layerdrop: a layer that the model leaves out by chance did not run, as the report then says, and here all have to."""
    for each in model.modules():
        for holder in (each, getattr(each, "config", None)):
            for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
                if isinstance(getattr(holder, name, None), float):
                    setattr(holder, name, 0.0)


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, seed: int) -> list[Tensor]:
    """All outputs that have gradients, with the same random numbers for the same seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # transformers draws its masks over time from it
    found = pytree.tree_leaves(model(*args, **kwargs))
    return [value for value in found if isinstance(value, Tensor) and value.requires_grad]


def first(live: nn.Module, seconds: float) -> Iterator[Row]:
    """What the first step says: weights planned, refused and why, never read, and where the graph broke."""
    rows = nm.report(live).rows
    unread = list(carried(live).late)
    yield {
        "first_seconds": seconds, "unread": unread, "breaks": {why[:300]: n for why, n in counters["graph_break"].items()},
        "planned": sum(row.status == "sparse" for row in rows),
        "reasons": histogram([row.reason for row in rows if row.status == "dense"]),
    }  # fmt: skip


def carried(live: nn.Module) -> Prepared:
    """The carrier of a live model."""
    carrier = unwrap(live)
    assert isinstance(carrier, Prepared)
    return carrier


def check_gradients(live: nn.Module, step: int) -> None:
    """Of every weight that has run, and of its scores."""
    found = dict(live.named_parameters())
    carrier = carried(live)
    for name in carrier.sites:
        own = [name, *(f"{name}_{suffix}" for suffix in carrier.method.suffixes(carrier.sites[name]))]
        for each in (each for each in own if each in found and found[each].requires_grad):
            gradient = found[each].grad
            assert gradient is not None, f"step {step}: no gradient at {each}"
            assert gradient.isfinite().all(), f"step {step}: the gradient at {each} is not finite"


def frozen_difference(
    live: nn.Module, expected: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], *, exact: bool
) -> float:
    """The largest relative difference between what the live model computed and what the frozen one does.

    exact: whether both draw the same random numbers, so that it has to be small; inductor draws its own.
    """
    planned = set(carried(live).sites)
    frozen = nm.freeze(live)
    satisfied = set(nm.verify(frozen).satisfied)
    assert planned <= satisfied, f"not N:M when frozen: {sorted(planned - satisfied)}"
    found = outputs(frozen.train(), args, kwargs, seed=STEPS)
    assert len(found) == len(expected), f"{len(expected)} outputs live, {len(found)} frozen"
    worst = max(relative(mine, theirs) for mine, theirs in zip(expected, found, strict=True))
    assert worst < 1e-3 or not exact, f"the frozen model computes something else: {worst:.0e}"
    return worst


def relative(mine: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm."""
    mine, theirs = mine.detach().double(), theirs.detach().double()
    return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))
