# mypy: disable-error-code="no-any-return"
"""Models that use their weights in awkward ways, one idea a class, with inputs that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

WIDTH = 16
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Ends(nn.Module):
    """A stem and a head, dense by default: every awkward weight lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)


class Between(Ends):
    """Stem, ``middle``, head."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.middle(torch.tanh(self.stem(x))))

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class SharedWeight(Between):
    """Two layers own one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight

    def middle(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class UsedTwice(Between):
    """One layer is called twice, as in a recurrent depth."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.tanh(self.layer(x)))


class UsedBothWays(Between):
    """A tied autoencoder: W encodes, its transpose decodes. No pattern along one axis fits both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4)

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


class SharedModule(Between):
    """One child under two names, inside a list and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([self.layer, nn.Linear(WIDTH, WIDTH)])

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + self.layer(x)


class InPlace(Between):
    """Activations are overwritten: ``relu_``, ``+=`` and a slice that is assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        y = self.first(x).relu_()
        y += x
        y[:, :4] = 0.5 * y[:, :4]
        return self.second(y)


class CountsCalls(Between):
    """A buffer is updated in place in training mode, as batch norm does with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.average = nn.Buffer(torch.zeros(WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.average


class Keywords(Ends):
    """Keyword inputs: optional, defaulted, and constants that choose a path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, shift: Tensor | None = None, scale: float = 1.0, negate: bool = False) -> Tensor:
        y = self.layer(torch.tanh(self.stem(x))) * scale
        y = y if shift is None else y + shift
        return self.head(-y if negate else y)


@dataclass
class Registered:
    """A dataclass that pytree knows."""

    logits: Tensor
    hidden: Tensor | None = None


pytree.register_dataclass(Registered)


class Named(NamedTuple):
    """What pytree knows without being told."""

    logits: Tensor
    hidden: Tensor


@dataclass
class Unregistered:
    """A dataclass that nobody has told pytree about."""

    logits: Tensor
    hidden: Tensor


class ReturnsDataclass(Ends):
    """The output is a registered dataclass with an empty field."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Registered:
        return Registered(self.head(torch.tanh(self.layer(self.stem(x)))))


class ReturnsUnregistered(Ends):
    """The output is a dataclass that is a leaf to pytree, with tensors inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Unregistered:
        hidden = torch.tanh(self.layer(self.stem(x)))
        return Unregistered(self.head(hidden), hidden)


class NestedContainers(Ends):
    """Dicts of lists of tensors in; a dict with a named tuple, a list and a constant out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: dict[str, Any], pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        x = sum(batch["views"], pair[0] - pair[1])
        hidden = torch.tanh(self.layer(self.stem(x)))
        return {"out": Named(self.head(hidden), hidden), "all": [x, (hidden,)], "name": "nested", "none": None}


class BranchOnShape(Ends):
    """Python control flow on sizes that are static, and a loop over one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            x = x[:, None]
        x = torch.tanh(self.stem(x))
        for place in range(x.shape[1]):
            x = x + self.layer(x[:, place : place + 1])
        return self.head(x.mean(1) if x.shape[1] > 1 else x.squeeze(1))


class BranchOnData(Between):
    """``if x.sum() > 0``: which layer runs is known only when the values are."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.positive(x)
        return self.negative(x)


class BranchInTraining(Between):
    """A layer is left out at random in training, with Python's ``if``: only evaluation is one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < 0.5:
            return x
        return x + self.layer(x)


class Frozen(Between):
    """The first layer does not train, not even in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.frozen(x))
        return self.trained(x)


class BufferAsWeight(Between):
    """A fixed projection lies in a buffer, beside a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.fixed = nn.Buffer(torch.randn(WIDTH, WIDTH) / 4)

    def middle(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(F.linear(x, self.fixed)))


class SelfAttention(Between):
    """`nn.MultiheadAttention` on itself: one ``in_proj_weight`` of three."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(Ends):
    """`nn.MultiheadAttention` with keys and values of other widths: a weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=24, vdim=24, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x, memory = torch.tanh(self.stem(x)), self.memory(memory)
        y, seen = self.attention(x, memory, memory)
        return self.head(x + y), seen


class UnrolledLSTM(Between):
    """An LSTM written out: both weights are read once a step, and the gates are slices of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.recurrent = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], WIDTH)
        for step in range(x.shape[1]):
            keep, write, show, new = (self.inputs(x[:, step]) + self.recurrent(hidden)).chunk(4, -1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(write) * torch.tanh(new)
            hidden = torch.sigmoid(show) * torch.tanh(cell)
        return hidden


class LSTMCell(Between):
    """`nn.LSTMCell`, one operator a step, and a linear beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.layer = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], WIDTH)
        for step in range(x.shape[1]):
            hidden, cell = self.cell(self.layer(x[:, step]), (hidden, cell))
        return hidden


class Experts(Between):
    """A soft mixture over experts whose weights are one 3-D Parameter each, by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, 32) / 4)
        self.down = nn.Parameter(torch.randn(4, 32, WIDTH) / 4)

    def middle(self, x: Tensor) -> Tensor:
        share = torch.softmax(self.router(x), -1)
        each = torch.bmm(F.silu(torch.bmm(x.expand(4, -1, -1), self.up)), self.down)
        return x + torch.einsum("eto,te->to", each, share)


class EinsumExperts(Between):
    """The same mixture, its weights ``[expert, out, in]`` and its products einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, 32, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(4, WIDTH, 32) / 4)

    def middle(self, x: Tensor) -> Tensor:
        share = torch.softmax(self.router(x), -1)
        inner = F.silu(torch.einsum("ti,eoi->teo", x, self.up))
        return x + torch.einsum("teo,edo,te->td", inner, self.down, share)


class Conv1D(Between):
    """GPT-2's linear: ``addmm`` with a weight of ``[in, out]``, tokens flattened first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), nn.Parameter(torch.zeros(WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return torch.tanh(flat.view(*x.shape[:-1], WIDTH))


class RightTransposed(Between):
    """``x @ W.T``, as in Falcon."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


class LeftOperand(Between):
    """``W @ x.T``: the weight stands on the left and features run down the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight @ x.T).T


class TokenMixing(Between):
    """A weight that mixes tokens, not features: ``W @ x`` over ``[batch, tokens, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(8, 8) / 3)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.tanh(self.tokens @ x))


class EinsumLinears(Between):
    """Linears written as einsums: ``[out, in]``, ``[in, out]``, and per head ``[in, head, size]``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.columns = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.heads = nn.Parameter(torch.randn(WIDTH, 4, 4) / 4)
        self.merge = nn.Parameter(torch.randn(4, 4, WIDTH) / 4)

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.einsum("ti,oi->to", x, self.rows))
        x = torch.tanh(torch.einsum("ti,io->to", x, self.columns))
        return torch.einsum("ths,hso->to", torch.tanh(torch.einsum("ti,ihs->ths", x, self.heads)), self.merge)


class ConvAsLinear(Between):
    """1x1 convolutions over tokens, and a linear whose weight is a convolution's, reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.plain = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.plain(torch.tanh(self.conv(x.transpose(1, 2))))).transpose(1, 2)
        return F.linear(y, self.conv.weight.squeeze(-1))


class ComputedWeight(Between):
    """The weight is a function of Parameters: a weight-normalised layer and a low-rank addition."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Parameter(torch.randn(4, WIDTH) / 4), nn.Parameter(torch.randn(WIDTH, 4) / 4)

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.normed(torch.tanh(self.layer(x))))
        return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


def _flat() -> Tensor:
    return torch.randn(6, 8)


def _tokens() -> Tensor:
    return torch.randn(2, 8, 8)


def _on(kind: type[nn.Module], inputs: Callable[[], Any], **kwargs: Callable[[], Any]) -> Callable[[], Built]:
    def build() -> Built:
        args = inputs()
        return kind(), args if isinstance(args, tuple) else (args,), {name: value() for name, value in kwargs.items()}

    return build


AWKWARD: dict[str, Callable[[], Built]] = {
    "shared_weight": _on(SharedWeight, _flat),
    "used_twice": _on(UsedTwice, _flat),
    "used_both_ways": _on(UsedBothWays, _flat),
    "shared_module": _on(SharedModule, _flat),
    "in_place": _on(InPlace, _flat),
    "counts_calls": _on(CountsCalls, _flat),
    "keywords": _on(Keywords, _flat, shift=lambda: torch.randn(6, WIDTH), scale=lambda: 0.5, negate=lambda: True),
    "returns_dataclass": _on(ReturnsDataclass, _flat),
    "returns_unregistered": _on(ReturnsUnregistered, _flat),
    "nested_containers": _on(NestedContainers, lambda: ({"views": [_flat(), _flat()]}, (_flat(), _flat()))),
    "branch_on_shape": _on(BranchOnShape, lambda: torch.randn(2, 3, 8)),
    "branch_on_data": _on(BranchOnData, _flat),
    "branch_in_training": _on(BranchInTraining, _flat),
    "frozen": _on(Frozen, _flat),
    "buffer_as_weight": _on(BufferAsWeight, _flat),
    "self_attention": _on(SelfAttention, _tokens),
    "cross_attention": _on(CrossAttention, lambda: (_tokens(), torch.randn(2, 5, 8))),
    "unrolled_lstm": _on(UnrolledLSTM, lambda: torch.randn(2, 3, 8)),
    "lstm_cell": _on(LSTMCell, lambda: torch.randn(2, 3, 8)),
    "experts": _on(Experts, _flat),
    "einsum_experts": _on(EinsumExperts, _flat),
    "conv1d": _on(Conv1D, _tokens),
    "right_transposed": _on(RightTransposed, _flat),
    "left_operand": _on(LeftOperand, _flat),
    "token_mixing": _on(TokenMixing, _tokens),
    "einsum_linears": _on(EinsumLinears, _flat),
    "conv_as_linear": _on(ConvAsLinear, _tokens),
    "computed_weight": _on(ComputedWeight, _flat),
}
