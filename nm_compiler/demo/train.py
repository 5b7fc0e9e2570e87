"""The race: all contestants take every step side by side, with the same batch, the same rate and the same start.

Accuracy is of the frozen model, a plain module with zeros in its weights. Step times are of neighbouring moments, so a
busy machine slows all contestants alike.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.demo.data import Dataset, batches, load, steps_per_epoch
from nm_compiler.demo.models import build
from nm_compiler.demo.results import LayerOrder, Outcome, Run
from nm_compiler.demo.settings import METHODS, Entry, Settings
from nm_compiler.layout import as_rows
from nm_compiler.solvers.backward_order import kept_importance
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.state.beside import Weight

Progress = Callable[[int, int, str], None]
"""Told after every step: steps done, steps in all, and what is running."""
POINTS = 25  # accuracies in a curve, at most, and never more than epochs
PROBE = 1_000  # test images for the curves; the table uses all of them


def run(settings: Settings, progress: Progress | None = None) -> Outcome:
    """Train every contestant on every seed. Raises NMError if the data cannot be read."""
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    data = load(settings).to(settings.device)
    if settings.data is None:
        torch.set_num_threads(1)  # 8x8 images: a second thread only waits for the first
    try:
        _rehearse(settings, data)
        runs = [found for seed in range(settings.seeds) for found in race(settings, data, seed, progress)]
    finally:
        torch.set_num_threads(threads)
    sizes, steps = (len(data.train), len(data.test)), total_steps(settings, data)
    return Outcome(settings, data.name, sizes, steps, tuple(runs), data.test[:12].cpu(), time.perf_counter() - begin)


def total_steps(settings: Settings, data: Dataset) -> int:
    """Optimizer steps of each contestant."""
    return settings.epochs * steps_per_epoch(data, settings.batch_size)


def _rehearse(settings: Settings, data: Dataset) -> None:
    """One step of every contestant that nobody times.

    One-shot pruning compiles half-way: a pattern that fits no weight is to be refused before, not after minutes. And the first
    search for an order compiles kernels for seconds, where they are not on the disk yet: no part of what a search costs.
    """
    for entry in settings.entries:
        if entry.pattern:
            model, example = build(settings.model, seed=0).to(settings.device), data.normal(data.train[:2])
            sparse = nm.compile(model, (example,), pattern=entry.pattern, method=METHODS[entry.method]())
            sparse(example).sum().backward()
            nm.SparsityScheduler(sparse, total_steps=1).step()


def race(settings: Settings, data: Dataset, seed: int, progress: Progress | None = None) -> list[Run]:
    """All contestants of one seed, in lock step."""
    steps = total_steps(settings, data)
    start = build(settings.model, seed).to(settings.device)
    example = data.normal(data.train[:2])
    contestants = [Contestant(entry, copy.deepcopy(start), example, settings, steps, seed) for entry in settings.entries]
    points = min(POINTS, settings.epochs)
    looks = {round(point * steps / points) for point in range(1, points + 1)}
    for contestant in contestants:
        contestant.look(data)
    for step, (images, labels) in enumerate(batches(data, settings.batch_size, settings.epochs, seed), start=1):
        for contestant in contestants:
            contestant.step(images, labels)
            if step in looks:
                contestant.look(data)
        if progress:
            progress(seed * steps + step, settings.seeds * steps, f"seed {seed + 1} of {settings.seeds}")
    return [contestant.finish(data) for contestant in contestants]


class Contestant:
    """One way to train, a step at a time. One-shot magnitude trains dense for half the steps, then prunes."""

    def __init__(self, entry: Entry, model: nn.Module, example: Tensor, settings: Settings, steps: int, seed: int) -> None:
        self.entry, self.settings, self.steps = entry, settings, steps
        self.run = Run(entry, seed)
        self._example = example
        self._model, self._sparse = model, None if entry.method in ("dense", "magnitude") else self._compiled(model)
        self._scheduler = nm.SparsityScheduler(self._sparse, steps) if self._sparse else None
        self._optimizer = torch.optim.SGD(
            self._running.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self._first = self._backward_kept()

    def _compiled(self, model: nn.Module) -> nm.SparseModule:
        assert self.entry.pattern is not None
        method = METHODS[self.entry.method]()
        return nm.compile(model, (self._example,), pattern=self.entry.pattern, method=method, seed=self.run.seed)

    @property
    def _running(self) -> nn.Module:
        return self._sparse or self._model

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step, timed."""
        done = len(self.run.seconds)
        if self.entry.method == "magnitude" and done == self.steps // 2:
            self._sparse, self.run.begun = self._compiled(self._model), done
        rate = self.settings.lr * schedule(done, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        begin = self._now()
        self._optimizer.zero_grad()
        functional.cross_entropy(self._running(images), labels).backward()
        self._optimizer.step()
        between = self._now()
        if self._scheduler:
            self._scheduler.step()
            self.run.upkeep += self._now() - between
        self.run.seconds.append(between - begin)

    def look(self, data: Dataset) -> None:
        """Add a point to the curves: the accuracy as the model stands, and LBC's live combinations."""
        share = len(self.run.seconds) / self.steps
        self.run.curve.append((share, accuracy(self._running, data, PROBE)))
        if self._sparse and self.entry.method == "lbc":
            live = [row.live for row in nm.report(self._sparse).rows if row.live is not None]
            self.run.live.append((share, statistics.fmean(live)))

    def finish(self, data: Dataset) -> Run:
        """Freeze, verify and test."""
        found, model = self.run, self._model
        if self._sparse:
            assert self.entry.pattern is not None
            found.report = nm.report(self._sparse)
            found.retained = found.report.totals["retained"]
            found.orders = self._orders()
            names = [site.name for site in self._sparse.plan.sites]
            model = nm.freeze(self._sparse)
            satisfied = nm.verify(model, self.entry.pattern).satisfied
            found.exact = sum(1 in satisfied.get(name, ()) for name in names), len(names)
        found.accuracy = accuracy(model, data)
        found.sample = _middle_weight(model)
        return found

    def _backward_kept(self) -> dict[str, float]:
        if not self._sparse or self.entry.method != "bimask":
            return {}
        return {row.name: row.backward_kept for row in nm.report(self._sparse).rows if row.backward_kept is not None}

    def _orders(self) -> list[LayerOrder]:
        assert self._sparse is not None
        now = self._backward_kept()
        ordered = [weight for weight in self._sparse.weights if weight.site.name in now]
        return [_layer_order(weight, self._first[weight.site.name], now[weight.site.name]) for weight in ordered]

    def _now(self) -> float:
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: up over 5 % of the steps, then half a cosine down to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, limit: int | None = None) -> float:
    """The share of test images (the first ``limit``) that the model names correctly."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=data.test.device)
    labels = data.test_labels[:limit]
    for images, wanted in zip(data.test[:limit].split(1_000), labels.split(1_000), strict=True):
        right += (model(data.normal(images)).argmax(1) == wanted).sum()
    model.train()
    return int(right) / len(labels)


def _layer_order(weight: Weight, start: float, searched: float) -> LayerOrder:
    site, param = weight.site, weight.param.detach().cpu()
    n, m = site.pattern.n, site.pattern.m
    rows = as_rows(param.abs() * magnitude_mask(param, n, m, site.in_axis), site.rows).flatten(1)
    generator = torch.Generator().manual_seed(0)
    whole = float(rows.sum(dtype=torch.float64))
    chances = [float(kept_importance(rows, torch.randperm(site.out, generator=generator), n, m)) for _ in range(20)]
    identity = float(kept_importance(rows, torch.arange(site.out), n, m))
    return LayerOrder(site.name, start, identity / whole, statistics.fmean(chances) / whole, searched)


def _middle_weight(model: nn.Module) -> Tensor:
    """A picture of real weights: the middle tap of the last block's second convolution, ``[out, in]``."""
    weight = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)][
        -1
    ]
    return weight.detach()[:, :, 1, 1].cpu()
