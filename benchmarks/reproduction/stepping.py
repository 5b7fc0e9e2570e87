"""Forward, loss and backward of one batch: eager, or replayed as a CUDA graph.

A small network on a large GPU waits for its own launches: a step of ResNet-32 has about a thousand kernels. A graph replays
them at once. Gradients then always lie in the same tensors, and whatever changes between steps (weights, live sets, orders)
must change in place, which is how `nm_compiler` changes them. The optimizer stays outside.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[[Tensor, Tensor], Tensor]
"""images, labels -> loss (a scalar that the next step may overwrite); leaves gradients in ``.grad``."""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 for products, or nothing. No cache of cast weights: a graph must not keep tensors from outside of it."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


class Eager:
    """The plain step."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str, smoothing: float) -> None:
        self.model, self.device, self.precision, self.smoothing = model, device, precision, smoothing

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        return self.run(images, labels)

    def run(self, images: Tensor, labels: Tensor) -> Tensor:
        """The step, but for dropping old gradients."""
        with autocast(self.device, self.precision):
            logits = self.model(images)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        loss.backward()
        return loss.detach()


class Graphed:
    """The same, captured at the first call and again whenever other parameters want gradients (LBC's scores after t_f)."""

    def __init__(self, eager: Eager) -> None:
        self.eager = eager
        self._wanting: tuple[bool, ...] = ()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        wanting = tuple(parameter.requires_grad for parameter in self.eager.model.parameters())
        if wanting != self._wanting:
            self._capture(images, labels)
            self._wanting = wanting
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        for parameter in self.eager.model.parameters():
            parameter.grad = None
        self._images, self._labels = images.clone(), labels.clone()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._loss = self.eager.run(self._images, self._labels)


def warmed(eager: Eager, images: Tensor, labels: Tensor, *, graphs: bool) -> tuple[Step, str]:
    """The step to train with, after a few that settle libraries and allocators; the model's values are as before.

    Returns it with what was chosen and why: a graph that cannot be captured, or that does not compute what the eager step
    computes, is not used.
    """
    before = {name: value.clone() for name, value in eager.model.state_dict().items()}
    try:
        stream = torch.cuda.Stream() if graphs else None
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for _ in range(3):
                eager(images, labels)
        if not graphs:
            return eager, "eager"
        torch.cuda.synchronize()
        graphed = Graphed(eager)
        restore(eager.model, before)
        wanted = _result(eager, eager, images, labels)
        restore(eager.model, before)
        graphed(images, labels)  # captures, and runs once: the second run shows that gradients are not added up
        restore(eager.model, before)
        found = _result(graphed, eager, images, labels)
        off = difference(found, wanted)
        return (graphed, "cuda graph") if off < 0.02 else (eager, f"eager: the graph's loss and gradients are {off:.2g} off")
    except RuntimeError as error:
        return eager, f"eager: no CUDA graph ({str(error).splitlines()[0]})"
    finally:
        restore(eager.model, before)


@torch.no_grad()
def restore(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Write values back, in place."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(values[name])


def _result(step: Step, eager: Eager, images: Tensor, labels: Tensor) -> list[Tensor]:
    loss = step(images, labels)
    gradients = [parameter.grad for parameter in eager.model.parameters() if parameter.requires_grad]
    return [loss.clone(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The larger of the relative differences of the first tensor (the loss) and of all the others together."""
    parts = []
    for some, same in ((found[:1], wanted[:1]), (found[1:], wanted[1:])):
        apart = sum(float((a - b).double().square().sum()) for a, b in zip(some, same, strict=True))
        parts.append(math.sqrt(apart / max(1e-30, sum(float(b.double().square().sum()) for b in same))))
    return max(parts)
