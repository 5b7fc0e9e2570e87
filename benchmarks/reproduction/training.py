"""One run: from its first step to its JSON. Stopped at any time, it goes on from the last saved epoch, to the bit."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nm_compiler as nm
from reproduction.grid import LATE, METHODS, Cell, Recipe
from reproduction.images import Images
from reproduction.models import build
from reproduction.pool import LOOKS
from reproduction.stepping import Eager, autocast, restore, warmed

SAVE_EVERY_S = 30.0


@dataclass
class Found:
    """What a run found. Accuracies are shares of all test images; curve, live: by epoch; losses: means, an epoch each.

    accuracy: of the frozen model, after the last step; one_shot: right after pruning (magnitude and transposable);
    retained, backward_kept: see `nm.report`; exact: planned weights that `nm.verify` found to be N:M, and all planned;
    how: how a step ran.
    """

    weights: int
    sparse_weights: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    live: list[tuple[float, float]] = field(default_factory=list)
    accuracy: float | None = None
    one_shot: float | None = None
    retained: float | None = None
    backward_kept: float | None = None
    exact: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    how: str = ""


class Training:
    """A cell of the grid on a device: made without data, `attach` takes the images, `train` does the rest."""

    def __init__(self, cell: Cell, recipe: Recipe, device: torch.device, folder: Path, *, graphs: bool) -> None:
        self.cell, self.recipe, self.device, self.folder, self.graphs = cell, recipe, device, folder, graphs
        self.done, self.total = 0, 0
        self.sparse: nm.SparseModule | None = None
        self.scheduler: nm.SparsityScheduler | None = None
        self.model = build(cell.model, cell.seed).to(device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.found = Found(sum(p.numel() for p in self.model.parameters() if p.ndim > 1))
        if METHODS[cell.method] and cell.method not in LATE:
            self._compile()

    @property
    def running(self) -> nn.Module:
        """What is trained now: the model itself, or what `nm.compile` made of it."""
        return self.sparse or self.model

    def attach(self, images: Images) -> None:
        """Take the data and settle how a step runs."""
        self.images, self.per_epoch = images, images.steps(self.recipe.batch)
        self._settle()

    def speed(self, seconds: float) -> float:
        """Optimizer steps a second, Bi-Mask's searches included, measured for about ``seconds``; nothing is learned."""
        search, rehearsal = self.search_seconds(), self.rehearse()
        steps, begin, now = 0, time.perf_counter(), 0.0
        while now < seconds:
            for _ in itertools.islice(rehearsal, 10):
                steps += 1
            float(next(self.model.parameters()).detach().sum())  # waits for the device
            now = time.perf_counter() - begin
        rehearsal.close()
        return steps / (now + search * steps / self.recipe.interval)

    def train(self, epochs: float) -> Found:
        """Train to ``epochs`` in all, from what was saved if anything was; freeze, test, write the JSON."""
        for _ in self.steps(epochs):
            pass
        return self.found

    def steps(self, epochs: float) -> Generator[None]:
        """What `train` does, a step at a time, for one who has other runs to look after as well."""
        self.total = max(1, round(epochs * self.per_epoch))
        self._start()
        looks = {max(1, round(self.total * look / LOOKS)) for look in range(1, LOOKS)} - {self.total}
        begin, before = time.perf_counter(), self.found.seconds
        saved = begin
        while self.done < self.total:
            yield from self._epoch(looks)
            now = time.perf_counter()
            self.found.seconds = before + now - begin
            if now - saved > SAVE_EVERY_S and self.done < self.total:
                self._save()
                saved = now
        self._finish(epochs)

    def rehearse(self) -> Generator[None]:
        """Steps without end, from which nothing is learned: to be closed before the training begins."""
        kept = {name: value.clone() for name, value in self.running.state_dict().items()}
        optimizer = self._optimizer()
        try:
            while True:
                for images, labels in self.images.epoch(self.recipe.batch, self.cell.seed, 0):
                    self._step(images, labels)
                    optimizer.step()
                    yield
        finally:
            restore(self.running, kept)

    def search_seconds(self) -> float:
        """Seconds that one of Bi-Mask's searches takes, 0 for other methods; orders are as before."""
        if not self.sparse or "bimask" not in self.cell.method:
            return 0.0
        kept, seconds = {name: value.clone() for name, value in self.running.state_dict().items()}, 0.0
        for _ in range(2):  # the first compiles the search
            begin = time.perf_counter()
            nm.SparsityScheduler(self.sparse, total_steps=1_000).step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
        restore(self.running, kept)
        return seconds

    def accuracy(self, model: nn.Module | None = None) -> float:
        """The share of test images that a model, by default the one in training, names correctly."""
        model = model or self.running
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        model.eval()
        with torch.no_grad(), autocast(self.device, self.recipe.precision):
            for pixels, wanted in zip(self.images.test.split(1_000), self.images.test_labels.split(1_000), strict=True):
                right += (model(self.images.normal(pixels)).argmax(1) == wanted).sum()
        model.train()
        return int(right) / len(self.images.test)

    # -- between start and end -----------------------------------------------------------------------------------------

    def _epoch(self, looks: set[int]) -> Iterator[None]:
        losses, steps = torch.zeros((), device=self.device), 0
        epoch = self.images.epoch(self.recipe.batch, self.cell.seed, self.done // self.per_epoch)
        for images, labels in itertools.islice(epoch, self.total - self.done):
            if self.cell.method in LATE and self.done == self.total // 2:
                self._prune()
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr * self._rate()
            losses += self._step(images, labels)
            self.optimizer.step()
            if self.scheduler:
                self.scheduler.step()
            self.done, steps = self.done + 1, steps + 1
            if self.done in looks:
                self._look()
            yield
        self.found.losses.append(round(float(losses) / steps, 4))
        if not math.isfinite(self.found.losses[-1]):
            raise nm.NMError(f"{self.cell.name}: the loss is {self.found.losses[-1]} at step {self.done}: lower --lr")

    def _rate(self) -> float:
        """Half a cosine over the steps; two of them where the model is pruned half-way."""
        half = self.total // 2
        if self.cell.method in LATE:
            length, done = (half, self.done) if self.done < half else (self.total - half, self.done - half)
        else:
            length, done = self.total, self.done
        return 0.5 * (1 + math.cos(math.pi * done / length))

    def _look(self) -> None:
        at = round(self.done / self.per_epoch, 2)
        self.found.curve.append((at, self.accuracy()))
        if self.sparse and self.cell.method.startswith("lbc"):
            live = [self.sparse.method.live(weight) for weight in self.sparse.weights]
            self.found.live.append((at, round(statistics.fmean(value for value in live if value is not None), 3)))

    def _prune(self) -> None:
        self._compile()
        self.found.one_shot = self.accuracy()
        self._settle()
        self.optimizer = self._optimizer()

    def _compile(self) -> None:
        make = METHODS[self.cell.method]
        assert make is not None
        example = torch.zeros(2, 3, 32, 32, device=self.device)
        if self.recipe.channels_last:
            example = example.to(memory_format=torch.channels_last)
        self.sparse = nm.compile(
            self.model, (example,), pattern=self.cell.pattern, method=make(self.recipe), seed=self.cell.seed
        )
        self.found.sparse_weights = sum(weight.param.numel() for weight in self.sparse.weights)

    def _settle(self) -> None:
        model = torch.compile(self.running) if self.recipe.compiled else self.running
        eager = Eager(model, self.device, self.recipe.precision, self.recipe.smoothing)  # type: ignore[arg-type]
        images, labels = next(self.images.epoch(self.recipe.batch, self.cell.seed, 0))
        self._step, how = warmed(eager, images, labels, graphs=self.graphs)
        self.found.how = "torch.compile" if self.recipe.compiled else how

    def _optimizer(self) -> torch.optim.Optimizer:
        """SGD; no decay of biases and norms. LBC's scores learn at the rate and with the decay of the weights."""
        parameters = list(self.running.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, self.recipe.lr, momentum=self.recipe.momentum)

    # -- start and end -------------------------------------------------------------------------------------------------

    @property
    def file(self) -> Path:
        """Where the result goes."""
        return self.folder / f"{self.cell.name}.json"

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished run lies."""
        return self.folder / f"{self.cell.name}.pt"

    def _start(self) -> None:
        saved: dict[str, Any] | None = None
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=self.device)
            if (saved["total"], saved["recipe"]) != (self.total, asdict(self.recipe)):
                raise nm.NMError(f"{self.checkpoint} is of another length or recipe: remove it, or give the same options")
            if saved["pruned"]:
                self._compile()
                self._settle()
        self.optimizer = self._optimizer()
        if self.sparse and self.cell.method not in LATE:
            self.scheduler = nm.SparsityScheduler(self.sparse, total_steps=self.total)
        if saved:
            self.running.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.scheduler:
                self.scheduler.load_state_dict(saved["scheduler"])
            self.done, how = saved["done"], self.found.how
            self.found = Found(**{**saved["found"], "how": how})

    def _save(self) -> None:
        state = {
            "model": self.running.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "pruned": self.cell.method in LATE and self.sparse is not None,
            "total": self.total,
            "done": self.done,
            "recipe": asdict(self.recipe),
            "found": asdict(self.found),
        }
        half = self.checkpoint.with_suffix(f".{os.getpid()}.half")
        torch.save(state, half)
        half.replace(self.checkpoint)

    def _finish(self, epochs: float) -> None:
        found, model = self.found, self.model
        if self.sparse:
            report = nm.report(self.sparse)
            found.retained = report.totals["retained"]
            kept = [row.backward_kept for row in report.rows if row.backward_kept is not None]
            found.backward_kept = statistics.fmean(kept) if kept else None
            names = [weight.site.name for weight in self.sparse.weights]
            model = nm.freeze(self.sparse)
            satisfied = nm.verify(model, self.cell.pattern).satisfied
            found.exact = sum(1 in satisfied.get(name, ()) for name in names), len(names)
        found.accuracy = self.accuracy(model)
        found.curve.append((round(self.done / self.per_epoch, 2), found.accuracy))
        body = {
            "cell": self.cell.as_json(),
            "recipe": {**asdict(self.recipe), "epochs": epochs},
            "steps": self.total,
            "train": len(self.images.train),
            "test": len(self.images.test),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else str(self.device),
            "torch": torch.__version__,
            **asdict(found),
        }
        half = self.file.with_suffix(f".{os.getpid()}.half")
        half.write_text(json.dumps(body, indent=1) + "\n")
        half.replace(self.file)
        self.checkpoint.unlink(missing_ok=True)
