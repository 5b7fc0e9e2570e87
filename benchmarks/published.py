"""The two papers' layers as they were released, restated: the baseline that `nm_compiler` is measured against.

LBC      C(M, N) scores a group, live where they are not zero; mask = binary((scores * live) @ table), straight-through;
         before every step the k lowest scores of each group are set to zero.
Bi-Mask  both masks by argsort in every forward pass; a convolution is unfold, matmul, fold; every 100 steps the best of
         100 (CIFAR: 10) random orders of the output rows is taken, by the number of weights that the backward mask keeps.

Ref: LBC, NeurIPS 2022, eq. 4 to 8; Bi-Mask, ICML 2023, eq. 5 to 10. Nothing here is used by the library.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = nn.Conv2d | nn.Linear


def replace(model: nn.Module, weights: Collection[str], make: Callable[[Layer], nn.Module]) -> list[nn.Module]:
    """Put ``make(layer)`` in the place of the owners of ``weights``, in place. Returns what was put there."""
    made = []
    for name in weights:
        owner = name.removesuffix(".weight")
        new = make(cast(Layer, model.get_submodule(owner)))
        parent, _, leaf = owner.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        made.append(new)
    return made


class _Binary(torch.autograd.Function):
    """raw / raw where it is not zero; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        return raw / (raw + (raw == 0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


_binary: Callable[..., Tensor] = _Binary.apply


class PublishedLBC(nn.Module):
    """A layer with its scores ``[groups, C]``."""

    def __init__(self, layer: Layer, n: int, m: int) -> None:
        super().__init__()
        self.layer, self.m = layer, m
        rows = list(itertools.combinations(range(m), n))
        table = torch.zeros(len(rows), m)
        for row, chosen in enumerate(rows):
            table[row, list(chosen)] = 1
        self.table = nn.Parameter(table, requires_grad=False)
        start = 1 / float(table[:, 0].sum())
        self.scores = nn.Parameter(torch.full((layer.weight.numel() // m, len(rows)), start))

    def masked_weight(self) -> Tensor:
        """The weight that the product reads: the mask from all C scores of every group, times the weight."""
        live = (self.scores != 0).float()
        mask: Tensor = _binary((self.scores * live) @ self.table)
        weight = self.layer.weight
        if weight.ndim == 2:
            return mask.view(weight.shape) * weight
        rows = weight.permute(0, 2, 3, 1)
        return (mask.view(rows.shape) * rows).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        masked = self.masked_weight()
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, masked, self.layer.bias)
        return functional.conv2d(x, masked, self.layer.bias, self.layer.stride, self.layer.padding)

    @torch.no_grad()
    def remove(self, count: int) -> None:
        """Take the ``count`` lowest scores of every group out for good."""
        self.scores.sub_(1000.0 * (self.scores == 0))
        lowest = self.scores.topk(count, dim=1, largest=False).indices
        self.scores.scatter_(1, lowest, 0.0)


class _TwoMasks(torch.autograd.Function):
    """x @ (w * F), with dx through w * F * B and a dense dw that is pulled to zero outside F."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: Tensor, backward: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(x, weight, forward, backward)
        ctx.decay = decay
        return x @ (weight * forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, forward, backward = ctx.saved_tensors
        grad_x = grads[0] @ (weight * forward * backward).t()
        grad_weight = x.transpose(1, 2) @ grads[0] + ctx.decay * (1 - forward) * weight  # [batch, in, out]: autograd sums
        return grad_x, grad_weight, None, None, None


_two_masks: Callable[..., Tensor] = _TwoMasks.apply


class PublishedBiMask(nn.Module):
    """A layer with the order of its output rows. Weights are seen as ``[in * taps, out]``."""

    def __init__(self, layer: Layer, n: int, m: int, candidates: int, decay: float = 2e-4) -> None:
        super().__init__()
        self.layer, self.n, self.m, self.candidates, self.decay = layer, n, m, candidates, decay
        self.order = torch.arange(layer.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        columns = self.layer.weight.flatten(1).t()
        forward = self._forward_mask()
        backward = self._backward_mask(forward, self.order)
        if isinstance(self.layer, nn.Linear):
            y: Tensor = _two_masks(x, columns, forward, backward, self.decay)
            return y if self.layer.bias is None else y + self.layer.bias
        conv = self.layer
        unfolded = functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2)  # type: ignore[arg-type]
        flat: Tensor = _two_masks(unfolded, columns, forward, backward, self.decay)
        side = int(flat.shape[1] ** 0.5)
        return functional.fold(flat.transpose(1, 2), (side, side), (1, 1))

    @torch.no_grad()
    def search(self) -> None:
        """The best of ``candidates`` random orders, by the number of weights left in both masks."""
        forward, best = self._forward_mask(), 0
        for _ in range(self.candidates):
            order = torch.randperm(len(self.order))
            kept = int((forward * self._backward_mask(forward, order)).count_nonzero())
            if kept > best:
                self.order, best = order, kept

    def _forward_mask(self) -> Tensor:
        return _top(self.layer.weight.detach().flatten(1), self.n, self.m).t()

    def _backward_mask(self, forward: Tensor, order: Tensor) -> Tensor:
        ordered = (self.layer.weight.detach().flatten(1).t() * forward)[:, order]
        return _top(ordered, self.n, self.m)[:, order.argsort()]


def _top(values: Tensor, n: int, m: int) -> Tensor:
    """1 at the ``n`` largest magnitudes of every ``m`` consecutive entries of the last axis, 0 elsewhere."""
    groups = values.abs().reshape(-1, m)
    smallest = groups.argsort(dim=1)[:, : m - n]
    return torch.ones_like(groups).scatter_(1, smallest, 0.0).view(values.shape)
