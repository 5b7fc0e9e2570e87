"""One run of the character model: from its first step to its JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from networks import GPT
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from reproduction.grid import LATE, METHODS, Cell
from reproduction.stepping import Eager, autocast, warmed
from reproduction.text import SYMBOLS, Text

LOOKS = 5  # validation losses in a curve, the last one included
AT_ONCE = 16  # windows of held-out text in a forward pass


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """What all runs of a table share.

    decay, interval, t_f: as in `Recipe`; score_rate: times the rate of the weights; windows: of held-out text; warm: share of
    the steps over which the rate rises.
    """

    steps: int = 5_000
    batch: int = 32
    context: int = 128
    width: int = 128
    depth: int = 4
    heads: int = 4
    lr: float = 1e-3
    weight_decay: float = 0.1
    warm: float = 0.05
    decay: float = 2e-4
    interval: int = 100
    t_f: float = 0.5
    score_rate: float = 1.0
    windows: int = 2_048
    precision: str = "fp32"

    @property
    def model(self) -> str:
        """The name of the network in files and tables."""
        return f"gpt{self.depth}x{self.width}"

    def rate(self, done: int, total: int) -> float:
        """The share of ``lr`` in step ``done + 1`` of ``total``: up over the first steps, then half a cosine."""
        warm = max(1, round(self.warm * total))
        if done < warm:
            return (done + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, total - warm)))


def network(recipe: TextRecipe, seed: int) -> GPT:
    """The model, its first weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(len(SYMBOLS), recipe.context, recipe.width, recipe.depth, recipe.heads)


class Predicting:
    """A cell of the grid on a device."""

    def __init__(self, cell: Cell, recipe: TextRecipe, text: Text, device: torch.device, *, graphs: bool = False) -> None:
        self.cell, self.recipe, self.device, self.graphs = cell, recipe, device, graphs
        self.text = text.to(device)
        self.windows = self.text.windows(recipe.windows, recipe.context)
        self.model = network(recipe, cell.seed).to(device)
        self.sparse: nm.SparseModule | None = None
        self.scheduler: nm.SparsityScheduler | None = None
        if METHODS[cell.method] and cell.method not in LATE:
            self._compile()

    def train(self) -> dict[str, Any]:
        """All steps, then freeze, verify and test. Returns what the JSON has."""
        recipe, begin = self.recipe, time.perf_counter()
        late = self.cell.method in LATE
        parts = [recipe.steps // 2, recipe.steps - recipe.steps // 2] if late else [recipe.steps]
        looks = {max(1, round(recipe.steps * look / LOOKS)) for look in range(1, LOOKS)}
        found: dict[str, Any] = {"one_shot": None, "losses": [], "curve": [], "live": []}
        batches = self.text.batches(recipe.steps, recipe.batch, recipe.context, self.cell.seed)
        done, loss, since = 0, torch.zeros((), device=self.device), 0
        for number, total in enumerate(parts):
            if number:
                self._compile()
                found["one_shot"] = self.bits()
            self._begin(total)
            for step in range(total):
                loss += self._step(*next(batches), recipe.rate(step, total))
                done, since = done + 1, since + 1
                if done in looks or done == recipe.steps:
                    found["losses"].append([done, self._finite(loss / since)])
                    loss, since = torch.zeros((), device=self.device), 0
                if done in looks:
                    found["curve"].append([done, self.bits()])
                    found["live"] += self._live(done)
        found |= self._finish()
        found["curve"].append([done, found["bits"]])
        return self._about() | found | {"seconds": round(time.perf_counter() - begin, 1)}

    @torch.no_grad()
    def bits(self, model: nn.Module | None = None) -> float:
        """The mean loss of the held-out windows in bits per character, by default of the model in training."""
        model = model or self.sparse or self.model
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with autocast(self.device, self.recipe.precision):
            for part in self.windows.long().split(AT_ONCE):
                loss = functional.cross_entropy(model(part[:, :-1]).float(), part[:, 1:].flatten(), reduction="sum")
                total += loss.double()
        model.train()
        return float(total) / self.windows[:, 1:].numel() / math.log(2)

    def _compile(self) -> None:
        make = METHODS[self.cell.method]
        assert make is not None
        example = torch.zeros(2, self.recipe.context, dtype=torch.int64, device=self.device)
        self.sparse = nm.compile(
            self.model, (example,), pattern=self.cell.pattern, method=make(self.recipe), seed=self.cell.seed
        )

    def _begin(self, total: int) -> None:
        """An optimizer, a scheduler, and how a step runs, for the ``total`` steps to come."""
        running, recipe = self.sparse or self.model, self.recipe
        eager = Eager(running, self.device, recipe.precision, 0.0)
        first = next(self.text.batches(1, recipe.batch, recipe.context, self.cell.seed))
        self._work, self.how = warmed(eager, *first, graphs=self.graphs)
        parameters = list(running.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.sparse:
            groups = nm.parameter_groups(self.sparse, weight_decay=recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.99))
        if self.sparse:
            self.scheduler = nm.SparsityScheduler(self.sparse, total, optimizer=self.optimizer)

    def _step(self, symbols: Tensor, following: Tensor, rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate * (self.recipe.score_rate if group.get("name") == "scores" else 1.0)
        loss = self._work(symbols, following)
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        return loss

    def _finite(self, loss: Tensor) -> float:
        if not math.isfinite(float(loss)):
            raise nm.NMError(f"{self.cell.name}: the loss is {float(loss)}: lower --lr")
        return round(float(loss) / math.log(2), 4)

    def _live(self, done: int) -> list[list[float]]:
        if not self.sparse or not self.cell.method.startswith("lbc"):
            return []
        live = [self.sparse.method.live(weight) for weight in self.sparse.weights]
        return [[done, round(statistics.fmean(value for value in live if value is not None), 3)]]

    def _finish(self) -> dict[str, Any]:
        model: nn.Module = self.model
        found: dict[str, Any] = {"sparse_weights": 0, "retained": None, "backward_kept": None, "exact": [0, 0]}
        if self.sparse:
            report = nm.report(self.sparse)
            kept = [row.backward_kept for row in report.rows if row.backward_kept is not None]
            names = [weight.site.name for weight in self.sparse.weights]
            found["sparse_weights"] = sum(weight.param.numel() for weight in self.sparse.weights)
            found["retained"] = report.totals["retained"]
            found["backward_kept"] = statistics.fmean(kept) if kept else None
            model = nm.freeze(self.sparse)
            satisfied = nm.verify(model, self.cell.pattern).satisfied
            found["exact"] = [sum(1 in satisfied.get(name, ()) for name in names), len(names)]
        return found | {"bits": self.bits(model)}

    def _about(self) -> dict[str, Any]:
        device = self.device
        return {
            "cell": self.cell.as_json(),
            "recipe": asdict(self.recipe),
            "steps": self.recipe.steps,
            "weights": sum(p.numel() for p in network(self.recipe, 0).parameters() if p.ndim > 1),
            "train": len(self.text.train),
            "test": self.windows[:, 1:].numel(),
            "text": self.text.digest,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
            "how": self.how,
        }


def write(file: Path, body: dict[str, Any]) -> None:
    """The file is whole or not there."""
    half = file.with_suffix(f".{os.getpid()}.half")
    half.write_text(json.dumps(body, indent=1) + "\n")
    half.replace(file)
