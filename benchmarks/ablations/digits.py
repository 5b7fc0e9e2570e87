"""The training that all variants share: the demo's digits network, data and recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nm_compiler.demo.data import Dataset, batches, steps_per_epoch
from nm_compiler.demo.models import ResNet
from nm_compiler.demo.train import schedule
from nm_compiler.pattern import Pattern


@dataclass(frozen=True, slots=True)
class Training:
    """SGD with one cosine for everything that learns, scores included; the values are the demo's."""

    data: Dataset
    epochs: int = 25
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * steps_per_epoch(self.data, self.batch)

    @property
    def example(self) -> Tensor:
        """Two images, to compile with."""
        return self.data.normal(self.data.train[:2])

    def run(self, model: nn.Module, seed: int, *, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        """Train. before, after: called around every step with the number of steps done by then."""
        optimizer = torch.optim.SGD(model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        for step, (images, labels) in enumerate(batches(self.data, self.batch, self.epochs, seed)):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * schedule(step, self.steps)
            before(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            after(step + 1)


def network(pattern: str, seed: int) -> ResNet:
    """The demo's network, 8, 16 and 32 channels; twice as wide where groups are of 16, or M would not divide its channels."""
    wide = 1 + (Pattern.parse(pattern).m > 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(1, (8 * wide, 16 * wide, 32 * wide), 1)
