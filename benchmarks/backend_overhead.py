"""A training step through ``backend="nm_compiler"`` against the dense step through ``torch.compile`` with inductor.

    python benchmarks/backend_overhead.py [--quick] [--threads 1] [--only gpt resnet20]

Both run on inductor. *first call*: the first training step, in which everything is compiled, with empty caches. With
``--clock cpu``, for a busy machine: seconds computed, those of the C++ compiler, which then runs once at a time, included.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import CLOCKS, Spread, against, arguments, environment, interleaved, table, write
from networks import GPT, ResNet20
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import fresh_cache
from torch.nn import functional

import nm_compiler as nm

LENGTH = 100_000  # of the training that the steps are a part of; long, so that nothing falls due
STEP_BOUNDS = {"LBC": 1.10, "BiMask": 1.25}
FIRST_BOUND = 1.3


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, a batch and its labels."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor


def workloads(quick: bool) -> list[Workload]:
    """The two of the bounds; smaller batches with ``quick``."""
    torch.manual_seed(0)
    batch, images = (4, 16) if quick else (16, 128)
    words = torch.randint(1024, (batch, 128))
    return [
        Workload("gpt", GPT(1024, 128, width=512, heads=8), words, torch.randint(1024, (batch * 128,))),
        Workload("resnet20", ResNet20(), torch.randn(images, 3, 32, 32), torch.randint(10, (images,))),
    ]


def training(work: Workload, model: nn.Module, call: Callable[..., Any], after: Callable[[], object]) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        functional.cross_entropy(call(work.inputs), work.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def variant(work: Workload, name: str) -> Callable[[], None]:
    """Dense, or a method, not yet compiled."""
    model = copy.deepcopy(work.model).train()
    if name == "dense":
        return training(work, model, torch.compile(model, dynamic=False), lambda: None)
    live = nm.compile(model, method=nm.LBC() if name == "LBC" else nm.BiMask())
    scheduler = nm.SparsityScheduler(live, total_steps=LENGTH)
    if name == "LBC":
        scheduler.step()  # not all combinations are live: masks are real ones
        scheduler.last_step = LENGTH // 4
        return training(work, model, model, lambda: None)
    return training(work, model, model, lambda: None)


def computed() -> float:
    """Seconds that this process and the compilers it has waited for have computed."""
    return sum(os.times()[:4])


def measured(work: Workload, *, repeats: int, clock: str) -> dict[str, Any]:
    """Time one workload and print its table."""
    first, now = dict[str, float](), computed if clock == "cpu" else time.perf_counter
    steps = {name: variant(work, name) for name in ("dense", *STEP_BOUNDS)}
    for name, step in steps.items():
        with fresh_cache():
            start = now()
            step()
            first[name] = now() - start
    times = interleaved(steps, repeats=repeats, warmup=2, clock=CLOCKS[clock])
    rows, found = [], {}
    for name in steps:
        ratio: Spread = times[name].over(times["dense"])
        low, high = ratio.quartiles
        compiling = first[name] / first["dense"]
        bound = STEP_BOUNDS.get(name)
        rows.append([
            name, f"{1e3 * times[name].median:.1f}", f"{ratio.median:.3f}", f"{low:.3f}-{high:.3f}",
            against(ratio.median, bound), f"{first[name]:.1f}", f"{compiling:.2f}",
            against(compiling, FIRST_BOUND if bound else None),
        ])  # fmt: skip
        found[name] = {
            "step_seconds": times[name].as_json(), "ratio": ratio.as_json(), "bound": bound,
            "first_call_seconds": first[name], "first_call_ratio": compiling,
        }  # fmt: skip
    head = ["variant", "step ms", "x dense", "middle half", "bound", "first call s", "x dense", "bound"]
    print(f"\n{work.name}: a training step, 2:4, inductor, median of {repeats} rounds\n{table(head, rows)}", flush=True)
    return found


def main(flags: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = arguments("Steps of backend='nm_compiler' against dense inductor", Path(__file__).stem)
    parser.add_argument("--only", nargs="+", choices=["gpt", "resnet20"], help="these workloads")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: time computed, with --threads 1")
    given = parser.parse_args(flags)
    torch.set_num_threads(given.threads)
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    if given.clock == "cpu":
        config.compile_threads = 1  # compilers are children that are waited for, not workers
    started = environment(given.threads)
    with fresh_cache():  # what the first compilation of a process brings with it is nobody's
        tiny = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        torch.compile(tiny)(torch.randn(2, 8)).sum().backward()
        nm.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))(torch.randn(2, 8)).sum().backward()
    chosen = [work for work in workloads(given.quick) if not given.only or work.name in given.only]
    repeats = 3 if given.quick else given.repeats
    found = {work.name: measured(work, repeats=repeats, clock=given.clock) for work in chosen}
    write(given.out, started, {"clock": given.clock} | found)


if __name__ == "__main__":
    main(sys.argv[1:])
