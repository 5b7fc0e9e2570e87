"""A training step of every method beside the dense one: bf16 autocast, SGD with momentum, forward to scheduler.

Eager steps of networks with many small weights wait for the host. The same forward and backward as a CUDA graph show what the
kernels cost.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import table
from networks import ResNet20, ResNet50, Transformer
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from gpu_sections.timing import Found, Work, in_turn, replayed

LENGTH = 100_000


@dataclass(frozen=True)
class Workload:
    """A model with a batch; compiled: measured under torch.compile as well."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    compiled: bool = False


def workloads(device: torch.device, dry: bool) -> list[Workload]:
    """ResNet-50 on 128 images; eight blocks of width 1,024 on 16,384 tokens."""
    torch.manual_seed(0)
    image: Any = ResNet20() if dry else ResNet50()
    shape, classes = ((4, 3, 32, 32), 10) if dry else ((128, 3, 224, 224), 1000)
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, shape[:1], device=device)
    width, depth, batch, length = (64, 1, 2, 16) if dry else (1024, 8, 16, 1024)
    text = Transformer(width, depth, width // 64, 4 * width).to(device)
    words = torch.randint(1024, (batch, length), device=device)
    return [
        Workload("images", image.to(device, memory_format=torch.channels_last), images, labels),
        Workload("tokens", text, words, torch.randint(1024, (batch * length,), device=device), compiled=True),
    ]


def step_of(work: Workload, model: nn.Module, run: Callable[..., Any], after: Callable[[], object]) -> Callable[[], None]:
    """One training step; ``run`` is the model, compiled or not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        with torch.autocast(work.inputs.device.type, torch.bfloat16):
            loss = functional.cross_entropy(run(work.inputs), work.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


METHODS: dict[str, Callable[[], nm.Method]] = {
    "LBC": nm.LBC, "BiMask": nm.BiMask, "SRSTE": nm.SRSTE, "Magnitude": nm.Magnitude,
}  # fmt: skip


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Milliseconds a step, 2:4; searches of the backward order are timed apart, as they fall due every 100 steps."""
    found["training"] = []
    for work in workloads(device, dry):
        models, after, late = _models(work, device, dry)
        for how in ("eager", "graph", "compiled"):
            if (how == "graph" and device.type != "cuda") or (how == "compiled" and (dry or not work.compiled)):
                continue
            begin = time.perf_counter()
            variants: dict[str, Work] = {}
            for name in models if how != "compiled" else ("dense", "LBC"):
                if how == "graph":
                    variants[name] = replayed(_forward_and_backward(work, models[name]))
                else:
                    run = torch.compile(models[name]) if how == "compiled" else models[name]
                    variants[name] = step_of(work, models[name], run, after[name])
            ms = in_turn(variants, device, repeats=2 if dry else 9, warmup=3)
            rows = []
            for name, value in ms.items():
                whole = (value + late.get(name, 0.0) / 100) / ms["dense"]
                rows.append([f"{work.name}, {how}: {name}", f"{value:.1f}", f"{value / ms['dense']:.3f}", f"{whole:.3f}"])
            print(table(["a training step, bf16", "ms", "x dense", "x with due"], rows), flush=True)
            found["training"].append({"workload": work.name, "how": how, "ms": ms, "due_every_100_ms": late,
                                      "seconds": time.perf_counter() - begin})  # fmt: skip


def _models(
    work: Workload, device: torch.device, dry: bool
) -> tuple[dict[str, nn.Module], dict[str, Callable[[], object]], dict[str, float]]:
    """The dense and the sparse models, what follows a step of each, and milliseconds of what falls due every 100 steps."""
    models: dict[str, nn.Module] = {"dense": copy.deepcopy(work.model).train()}
    after, late = dict[str, Callable[[], object]](dense=lambda: None), dict[str, float]()
    for name, method in METHODS.items():
        sparse = nm.compile(copy.deepcopy(work.model), (work.inputs[:2],), method=method()).train()
        scheduler = nm.SparsityScheduler(sparse, total_steps=LENGTH)
        models[name], after[name] = sparse, scheduler.step
        if name == "BiMask":
            late[name] = in_turn({name: _due(scheduler)}, device, repeats=1 if dry else 3, warmup=1)[name]
            print(f"{work.name}: a search of all orders takes {late[name]:.1f} ms", flush=True)
    return models, after, late


def _forward_and_backward(work: Workload, model: nn.Module) -> Callable[[], None]:
    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(work.inputs.device.type, torch.bfloat16, cache_enabled=False):
            loss = functional.cross_entropy(model(work.inputs), work.labels)
        loss.backward()

    return run


def _due(scheduler: nm.SparsityScheduler) -> Callable[[], None]:
    def search() -> None:
        scheduler.last_step = 0
        scheduler.step()

    return search
