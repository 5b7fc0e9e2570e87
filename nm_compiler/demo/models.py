"""The networks of the demo: a narrow residual net for 8x8 digits, and the ResNets of He et al. (2016) for CIFAR-10.

All are stem, stages of residual blocks, head; a shortcut is a 1x1 convolution where the shape changes (option B of the
paper). The library leaves the stem and the head dense by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nm_compiler.errors import NMError


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """widths: channels of each stage, halving the image from the second on; depth: blocks in each stage."""

    def __init__(self, channels: int, widths: Sequence[int], depth: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for index in range(depth):
                blocks.append(Block(inputs, width, stride=2 if stage and not index else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def digits_net() -> ResNet:
    """About 20 thousand weights: 8, 16 and 32 channels, one block each."""
    return ResNet(1, (8, 16, 32), 1)


def resnet20() -> ResNet:
    """0.27 million weights: 16, 32 and 64 channels, three blocks each."""
    return ResNet(3, (16, 32, 64), 3)


def resnet32() -> ResNet:
    """0.46 million weights: 16, 32 and 64 channels, five blocks each."""
    return ResNet(3, (16, 32, 64), 5)


MODELS: dict[str, Callable[[], ResNet]] = {"digits": digits_net, "resnet20": resnet20, "resnet32": resnet32}


def build(name: str, seed: int) -> ResNet:
    """The model called ``name``, its initial weights drawn from ``seed``. Raises NMError for another name."""
    if name not in MODELS:
        raise NMError(f"no model called {name!r}: choose one of {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()
