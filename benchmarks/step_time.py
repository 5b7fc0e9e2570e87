"""A whole training step of every method against the dense one: forward, loss, backward, optimizer, scheduler.

    python benchmarks/step_time.py [--quick] [--threads 2] [--only resnet20] [--profile "BiMask"]

See README.md for what the columns mean.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import CLOCKS, Clock, Spread, against, arguments, environment, interleaved, seconds, table, write
from networks import ResNet20, ResNet50, Transformer, ViTB16
from published import PublishedBiMask, PublishedLBC, replace
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import nm_compiler as nm

LENGTH = 100_000  # of the training that the measured steps are a part of; long, so that nothing falls due by chance
SHORT = 1_000  # LBC retires C - 1 times a training: its cost is spread over a training as short as this
OWN_WORK = ("nm::live_mask", "nm::unpack_mask", "nm::score_weight", "nm::srste_weight", "nm::masked_weight",
            "nm::backward_weight")  # fmt: skip
OWN_BACKWARD = tuple(name.replace("::", "_") for name in OWN_WORK)


@dataclass(frozen=True, slots=True)
class Workload:
    """A model with a batch, and how it is trained."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    lr: float
    candidates: int  # orders that the published Bi-Mask tries: 10 in its CIFAR code, else 100
    bounds: tuple[float, float]  # of LBC and of Bi-Mask, and under torch.compile below
    compiled_bounds: tuple[float, float] = (1.05, 1.20)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train: ``step`` is timed every round; ``due`` falls due once in ``every`` steps and is timed apart."""

    name: str
    step: Callable[[], None]
    due: Callable[[], object] | None = None
    every: float = 1.0
    bound: float | None = None


def workloads() -> list[Workload]:
    """Random data, since values do not change the time. The two large ones have the layers of ResNet-50 and ViT-S; images of
    112 pixels, and four of the twelve blocks, keep a step at seconds.
    """
    torch.manual_seed(0)
    images, classes = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    words, following = torch.randint(1024, (32, 128)), torch.randint(1024, (32 * 128,))
    photos, large, of_photos = torch.randn(32, 3, 112, 112), torch.randn(32, 3, 224, 224), torch.randint(1000, (32,))
    return [
        Workload("resnet20", ResNet20(), images, classes, lr=0.1, candidates=10, bounds=(1.15, 1.35)),
        Workload("transformer", Transformer(), words, following, lr=0.01, candidates=100, bounds=(1.15, 1.35)),
        Workload("resnet50", ResNet50(), photos, of_photos, lr=0.01, candidates=100, bounds=(1.10, 1.30)),
        Workload("vit_s", ViTB16(width=384, depth=4), large, of_photos, lr=0.01, candidates=100, bounds=(1.10, 1.30)),
    ]


Wrap = Callable[[nn.Module], nn.Module]


def _eager(model: nn.Module) -> nn.Module:
    return model


def training(
    work: Workload, model: nn.Module, after: Callable[[], object] = lambda: None, wrap: Wrap = _eager
) -> Callable[[], None]:
    """A training step; ``after`` runs at its end, as a scheduler does. wrap: torch.compile, or nothing."""
    model.train()
    fused = None if wrap is _eager else True  # who compiles the model fuses the optimizer, too
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr, momentum=0.9, weight_decay=1e-4, fused=fused)
    running = wrap(model)

    def step() -> None:
        functional.cross_entropy(running(work.inputs), work.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def ours(
    work: Workload,
    name: str,
    method: Any,
    *,
    settled: bool = False,
    bound: float | None = None,
    wrap: Wrap = _eager,
) -> Variant:
    """A compiled model. LBC is measured with half of its combinations live, or ``settled``: after t_f."""
    sparse = nm.compile(copy.deepcopy(work.model), (work.inputs,), method=method)
    scheduler = nm.SparsityScheduler(sparse, total_steps=LENGTH)
    step = training(work, sparse, scheduler.step, wrap)
    step()
    if isinstance(method, nm.BiMask):
        return Variant(name, step, lambda: _at(scheduler, 0), method.interval, bound)
    if isinstance(method, nm.LBC):
        site = sparse.weights[0].site
        counts = [method.live_count(site, at, LENGTH) for at in range(LENGTH)]
        retiring = counts.index(1 if settled else max(counts) // 2) - 1
        _at(scheduler, retiring)
        return Variant(name, step, None if settled else lambda: _at(scheduler, retiring), SHORT / (max(counts) - 1), bound)
    return Variant(name, step, bound=bound)


def _at(scheduler: nm.SparsityScheduler, step: int) -> None:
    """What ``scheduler.step()`` does when ``step`` steps are done."""
    scheduler.last_step = step
    scheduler.step()


def published(work: Workload, weights: Collection[str]) -> list[Variant]:
    """The released formulations on the same weights."""
    lbc, bimask = copy.deepcopy(work.model), copy.deepcopy(work.model)
    scored = replace(lbc, weights, lambda layer: PublishedLBC(layer, 2, 4))
    masked = replace(bimask, weights, lambda layer: PublishedBiMask(layer, 2, 4, work.candidates))
    return [
        Variant("LBC as published", training(work, lbc, lambda: [layer.remove(3) for layer in scored])),  # type: ignore[operator]
        Variant("Bi-Mask as published", training(work, bimask), lambda: [layer.search() for layer in masked], 100),  # type: ignore[operator]
    ]


def compiled_variants(work: Workload) -> list[Variant]:
    """All under torch.compile with its own backend, dense first."""
    wrap: Wrap = partial(torch.compile, dynamic=False)  # type: ignore[assignment]
    lbc, bimask = work.compiled_bounds
    return [
        Variant("dense", training(work, copy.deepcopy(work.model), wrap=wrap)),
        ours(work, "LBC(position)", nm.LBC(), bound=lbc, wrap=wrap),
        ours(work, "BiMask", nm.BiMask(), bound=bimask, wrap=wrap),
        ours(work, "SRSTE", nm.SRSTE(), wrap=wrap),
    ]


def variants(work: Workload) -> list[Variant]:
    """Dense first: it is what the others are divided by."""
    lbc, bimask = work.bounds
    plan = nm.compile(copy.deepcopy(work.model), (work.inputs,))
    return [
        Variant("dense", training(work, copy.deepcopy(work.model))),
        ours(work, "LBC(position)", nm.LBC(), bound=lbc),
        ours(work, "LBC(combination)", nm.LBC(scores="combination")),
        ours(work, "LBC(position) after t_f", nm.LBC(), settled=True),
        ours(work, "BiMask", nm.BiMask(), bound=bimask),
        ours(work, "SRSTE", nm.SRSTE()),
        ours(work, "Magnitude", nm.Magnitude()),
        *published(work, [weight.site.name for weight in plan.weights]),
    ]


def measured(work: Workload, *, repeats: int, clock: Clock, compiled: bool) -> dict[str, Any]:
    """Time one workload and print its table. Returns what goes into the JSON."""
    chosen = compiled_variants(work) if compiled else variants(work)
    times = interleaved({each.name: each.step for each in chosen}, repeats=repeats, warmup=2, clock=clock)
    dense, rows, found = times["dense"], [], {}
    for each in chosen:
        ratio = times[each.name].over(dense)
        due = Spread(tuple(seconds(each.due, clock) for _ in range(1 if repeats < 5 else 3))) if each.due else None
        extra = due.median / each.every / dense.median if due else 0.0
        total, share = ratio.median + extra, own_share(each)
        low, high = ratio.quartiles
        rows.append([
            each.name, f"{1e3 * times[each.name].median:.1f}", f"{ratio.median:.3f}", f"{low:.3f}-{high:.3f}",
            f"{1e3 * due.median:.0f} / {each.every:.0f}" if due else "", f"{total:.3f}", against(total, each.bound),
            f"{100 * share:.1f}" if "published" not in each.name and each.name != "dense" else "",
        ])  # fmt: skip
        found[each.name] = {
            "step_seconds": times[each.name].as_json(), "ratio": ratio.as_json(), "ratio_with_due": total,
            "due_seconds": due.as_json() if due else None, "due_every": each.every if due else None,
            "bound": each.bound, "own_share": share,
        }  # fmt: skip
    head = ["variant", "step ms", "x dense", "middle half", "due ms / every", "x with due", "bound", "own ops %"]
    how = "torch.compile" if compiled else "eager"
    print(f"\n{work.name}: a training step, 2:4, {how}, median of {repeats} rounds\n{table(head, rows)}", flush=True)
    return found


def own_share(variant: Variant) -> float:
    """The part of a step's time inside the library's mask and score ops, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        variant.step()
    events = trace.events() or []
    whole = sum(event.cpu_time_total for event in events if event.cpu_parent is None)
    return float(sum(event.cpu_time_total for event in events if _is_own(event)) / whole)


def _is_own(event: FunctionEvent) -> bool:
    """Whether an event is mask or score work and nothing around it is counted already."""
    parents, parent = [], event.cpu_parent
    while parent is not None:
        parents.append(parent)
        parent = parent.cpu_parent
    return _named(event) and not any(_named(parent) for parent in parents)


def _named(event: FunctionEvent) -> bool:
    return event.name.startswith(OWN_WORK) or any(name in event.name for name in OWN_BACKWARD)


def show_profile(work: Workload, name: str) -> None:
    """The costliest ops of a variant, beside the dense step's."""
    for each in variants(work):
        if each.name in ("dense", name):
            each.step()
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                for _ in range(3):
                    each.step()
            print(f"\n{work.name}, {each.name}, three steps")
            print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def main(flags: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = arguments("Training steps against the dense step", Path(__file__).stem)
    parser.add_argument("--only", nargs="+", choices=["resnet20", "transformer", "resnet50", "vit_s"], help="these workloads")
    parser.add_argument("--compile", action="store_true", help="every variant under torch.compile")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: time computed, with --threads 1")
    parser.add_argument("--profile", metavar="VARIANT", help="print where the time of a variant goes, and measure nothing")
    given = parser.parse_args(flags)
    torch.set_num_threads(given.threads)
    started = environment(given.threads)
    chosen = [work for work in workloads() if not given.only or work.name in given.only]
    if given.profile:
        for work in chosen:
            show_profile(work, given.profile)
        return
    repeats = 3 if given.quick else given.repeats
    options: dict[str, Any] = {"repeats": repeats, "clock": CLOCKS[given.clock], "compiled": given.compile}
    found = {work.name: measured(work, **options) for work in chosen}
    write(given.out, started, {"clock": given.clock, "compiled": given.compile} | found)


if __name__ == "__main__":
    main(sys.argv[1:])
