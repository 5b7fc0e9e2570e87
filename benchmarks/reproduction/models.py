"""CIFAR-10 networks of the LBC and Bi-Mask papers, standard and as their code really has them.

resnet32x2 is the "ResNet-32" of the Bi-Mask code: twice as wide as that of He et al. (2016), shortcuts subsampled and padded
with zeros. mobilenetv2_fullconv is its "MobileNetV2", whose 3x3 convolutions are not depthwise: 43 million weights. VGG-19's
head is a linear layer here; the code has a sparse 1x1 convolution with 10 outputs, which no group of 4 divides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from networks import CifarBlock
from torch import Tensor, nn
from torch.nn import functional


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: 6 * depth + 2 layers, ``width`` channels and then twice and four times as many."""

    def __init__(self, depth: int, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, before = [], width
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            for index in range(depth):
                blocks.append(CifarBlock(before, channels, 2 if stage and not index else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)
        _he(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(functional.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


class VGG19(nn.Module):
    """Simonyan & Zisserman 2015 with batch norm, for 32x32: five poolings, one linear layer. 20 million weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)
        _he(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """Expand by 1x1, 3x3, project by 1x1; added to its input where the shapes agree."""

    def __init__(self, before: int, channels: int, stride: int, expand: int, depthwise: bool) -> None:
        super().__init__()
        hidden = before * expand
        self.expand = nn.Sequential()
        if expand != 1:
            self.expand = nn.Sequential(nn.Conv2d(before, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        groups = hidden if depthwise else 1
        self.spatial = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.added = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.spatial(self.expand(x)))
        return x + y if self.added else y


class MobileNetV2(nn.Module):
    """Sandler et al. 2018 for 32x32: strides of 1 in the stem and the second stage. 2.2 million weights if depthwise."""

    def __init__(self, depthwise: bool = True, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        blocks, before = [], 32
        plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        for expand, channels, count, stride in plan:
            for index in range(count):
                blocks.append(InvertedResidual(before, channels, 1 if index else stride, expand, depthwise))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
        self.head = nn.Linear(1280, classes)
        _he(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet32x2": lambda: CifarResNet(5, 32),
    "resnet32": lambda: CifarResNet(5, 16),
    "resnet20": lambda: CifarResNet(3, 16),
    "vgg19": VGG19,
    "mobilenetv2": MobileNetV2,
    "mobilenetv2_fullconv": lambda: MobileNetV2(depthwise=False),
}


def build(name: str, seed: int) -> nn.Module:
    """The network, its weights drawn on the CPU from ``seed``: every method starts at the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()


def _he(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
