"""Put weight axes that are coupled in another order, in place; the graph stays, and computes the same function.

    before                              after
    %w1 = self.fc1.weight               %w1 = self.fc1.weight        # rows in the new order
    %b1 = self.fc1.bias                 %b1 = self.fc1.bias          # entries in the new order
    %h = linear(%x, %w1, %b1)           %h = linear(%x, %w1, %b1)    # channels in the new order
    %w2 = self.fc2.weight               %w2 = self.fc2.weight        # columns in the new order
    %y = linear(relu(%h), %w2)          %y = linear(relu(%h), %w2)   # as before

All or nothing: orders are checked before the first write, and what was written is put back if a later write fails.
Reference: Pool & Yu, *Channel Permutations for N:M Sparsity* (NeurIPS 2021), over every axis the graph couples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.axes.reorder import Orders, inverse, needs_of, reorder
from nm_compiler.axes.result import Axes, Axis, leaves
from nm_compiler.graph import getattr_path


def permute(gm: GraphModule, *, axes: Axes, orders: Orders, beside: Sequence[tuple[str, Tensor]] = ()) -> GraphModule:
    """Permute the parameters and buffers that ``gm`` is bound to; arguments as `permute_state`."""
    permute_state(gm, axes=axes, orders=orders, beside=beside)
    return gm


def permute_state(owner: nn.Module, *, axes: Axes, orders: Orders, beside: Sequence[tuple[str, Tensor]] = ()) -> None:
    """Permute the parameters and buffers of ``owner``, a model or a graph that is bound to one.

    axes: of the model; orders: int64 ``[*rows, size]`` by class name, valid ones (see `nm_compiler.axes.orders`);
    beside: tensors that go along with a parameter of their shape, such as an optimizer's momentum, by its name.
    """
    needs = needs_of(axes)
    tensors: list[tuple[Tensor, Sequence[Axis]]] = [(getattr_path(owner, name), layout) for name, layout in axes.state.items()]
    tensors += [(tensor, axes.state[name]) for name, tensor in beside if name in axes.state]
    done, current = list[tuple[Tensor, Sequence[Axis]]](), list[tuple[Tensor, Tensor]]()
    try:
        for tensor, layout in tensors:
            new = _reordered(tensor, layout, orders, needs)
            if new is not None:
                current = [(tensor, tensor.detach().clone())]
                _write(tensor, new)
                done.append((tensor, layout))
    except BaseException:
        back = inverse(orders, needs)
        for tensor, value in current:  # it may be written, or half
            _write(tensor, value)
        for tensor, layout in done:
            old = _reordered(tensor, layout, back, needs)
            if old is not None and not any(tensor is one for one, _ in current):
                _write(tensor, old)
        raise


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


def _reordered(tensor: Tensor, layout: Sequence[Axis], orders: Orders, needs: dict[str, tuple[str, ...]]) -> Tensor | None:
    """A copy in the new order; None where no order is about the tensor."""
    here = dict(_on(tensor, layout, orders))
    held = tensor.detach()
    new = reorder(held, layout, here, needs) if here else held
    return None if new is held else new


def _on(tensor: Tensor, layout: Sequence[Axis], orders: Orders) -> Iterator[tuple[str, Tensor]]:
    for axis in layout:
        for leaf in leaves(axis):
            if leaf.name in orders:
                yield leaf.name, orders[leaf.name].to(tensor.device)
