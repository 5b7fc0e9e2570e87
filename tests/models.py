# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Tiny models the tests share. Stem and head stay dense by default; what lies between is N:M."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.sites.uses import CONVS


class MLP(nn.Module):
    """Three linears: stem, one sparse weight, head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Remembering(MLP):
    """In evaluation mode it keeps what it makes of a parameter until it trains again, as timm's LeViT does its biases."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.bias, self.kept = nn.Parameter(torch.randn(width)), dict[str, Tensor]()

    def train(self, mode: bool = True) -> Remembering:
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.fc3(torch.relu(self.fc2(self.fc1(x)) + self.bias.exp()))
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias.exp()
        return self.fc3(torch.relu(self.fc2(self.fc1(x)) + self.kept["bias"]))


class Breaking(MLP):
    """TorchDynamo takes it in two fragments: one ends between the second and the third linear."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc2(torch.relu(self.fc1(x))))
        torch._dynamo.graph_break()
        return self.fc3(y)


class Stepping(nn.Module):
    """A step of decoding: it writes its row to a cache of four rows, and how many there are to a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, cache: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(self.fc2(torch.relu(self.fc1(x))))
        cache.index_copy_(1, length.reshape(1), y[:, None])
        length.add_(1)
        return self.fc3(cache.sum(1)), cache, length


class ConvNet(nn.Module):
    """A residual block with batch norm and dropout, a strided convolution, a mean and a linear head."""

    def __init__(self, channels: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 1, stride=2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm1(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.head(self.dropout(x.mean((2, 3))))


class Attention(nn.Module):
    """An embedding, self-attention with one fused projection, and a tied output."""

    def __init__(self, words: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.zeros(1, 6, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens) + self.position[:, : tokens.shape[1]])
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(-1, -2) / 4.0, -1) @ v)
        return self.head(x)


class Matmuls(nn.Module):
    """The same product written four ways: x @ W, x @ W.T, addmm and linear; plus 1-D and 3-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.right = nn.Parameter(torch.randn(16, 16) / 4)
        self.transposed = nn.Parameter(torch.randn(16, 16) / 4)
        self.added = nn.Parameter(torch.randn(16, 24) / 4)
        self.bias = nn.Parameter(torch.zeros(24))
        self.conv1 = nn.Conv1d(8, 8, 3, padding="same", dilation=2)
        self.conv3 = nn.Conv3d(8, 8, (1, 1, 2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(x @ self.right)
        x = torch.tanh(x @ self.transposed.T)
        x = torch.tanh(torch.addmm(self.bias, x, self.added)).view(-1, 8, 3)
        x = torch.tanh(self.conv1(x))[:, :, None, None]
        x = torch.tanh(self.conv3(x)).flatten(1)
        return self.head(x)


class Oddities(nn.Module):
    """Weights that cannot be N:M, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 8)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv1d(8, 8, 1, groups=4)
        self.transposed = nn.ConvTranspose1d(8, 8, 1)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.gated = nn.GRU(8, 8, batch_first=True)
        self.table = nn.Parameter(torch.randn(1, 8))
        self.left = nn.Parameter(torch.randn(5, 5))
        self.unused = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm((5, 8))
        self.counts = nn.Parameter(torch.ones(8, 8, dtype=torch.int64), requires_grad=False)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.fc(self.embed(tokens)) + self.table + self.counts[:5].float()
        x = self.norm(self.left @ x)
        x = self.narrow(self.depthwise(x.transpose(1, 2)))
        x = self.transposed(x).transpose(1, 2)
        x = self.gated(self.recurrent(x)[0])[0]
        return self.head(x.mean(1))


class Grouped(nn.Module):
    """Grouped, dilated, strided convolutions on non-square images, one with an output count that does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.grouped = nn.Conv2d(16, 24, (3, 1), stride=(2, 1), padding=(1, 0), groups=2)
        self.dilated = nn.Conv2d(24, 8, 3, dilation=2, padding="same", bias=False)
        self.narrow = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.stem(x))))
        x = torch.tanh(self.narrow(torch.tanh(self.dilated(x))))
        return self.head(x.mean((2, 3)))


def by_keyword(gm: GraphModule) -> GraphModule:
    """The graph, its linears and convolutions given all but data and weight by keyword."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.linear.default or node.target in CONVS:
            names = [argument.name for argument in node.target._schema.arguments]
            node.kwargs = {**node.kwargs, **dict(zip(names[2:], node.args[2:], strict=False))}
            node.args = node.args[:2]
    gm.recompile()
    return gm


def example(model: nn.Module, batch: int = 2, seed: int = 0) -> Tensor:
    """Inputs that fit one of the models above."""
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[type[nn.Module], Any]] = [(MLP, (8,)), (ConvNet, (3, 8, 8)), (Matmuls, (8,)), (Grouped, (3, 9, 7))]
    shape = next((shape for kind, shape in shapes if isinstance(model, kind)), None)
    if shape is None:
        length = 5 if isinstance(model, Oddities) else 6
        return torch.randint(0, 10, (batch, length), generator=generator)
    return torch.randn(batch, *shape, generator=generator)


class Branching(nn.Module):
    """Which of two weights runs is decided by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.25)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        y = self.up(y) if x.sum() > 0 else self.down(-y)
        return self.head(self.dropout(torch.tanh(self.last(y))))


def dense(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a model that was compiled computes with its dense weights; with gradients that is an error."""
    with torch.no_grad():
        return model(*args, **kwargs)


def steps(sparse: nn.Module, count: int, x: Tensor, scheduler: Any = None) -> None:
    """Train on one batch with SGD: ``count`` steps of the optimizer, and of the scheduler if one is given."""
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    for _ in range(count):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
