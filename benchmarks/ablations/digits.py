"""The training that all variants share: the demo's digits network, data and recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nm_compiler.demo.data import Dataset, batches, steps_per_epoch
from nm_compiler.demo.models import ResNet, build
from nm_compiler.demo.train import schedule


@dataclass(frozen=True, slots=True)
class Training:
    """One optimizer with one cosine for everything that learns, scores included; the values are the demo's."""

    data: Dataset
    epochs: int = 25
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    adam: bool = False

    @classmethod
    def with_adam(cls, data: Dataset, epochs: int = 25) -> Training:
        """AdamW in the place of SGD, with the weight decay of LBC's DeiT."""
        return cls(data, epochs, lr=3e-3, momentum=0.0, weight_decay=0.05, adam=True)

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
        optimizer = self._optimizer(model)
        for step, (images, labels) in enumerate(batches(self.data, self.batch, self.epochs, seed)):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * schedule(step, self.steps)
            before(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            after(step + 1)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def network(seed: int) -> ResNet:
    """The demo's: 8, 16 and 32 channels."""
    return build("digits", seed)
