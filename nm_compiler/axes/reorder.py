"""Put a tensor's entries in another order: arrays in, arrays out.

An order is ``new[i] = old[order[i]]``. One with rows has an order for every entry of the axes it depends on, counted as
they were before: ``new[i, j] = old[s[i], t[s[i], j]]`` for an order ``s`` of the rows and ``t`` within them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nm_compiler.axes.result import Axes, Axis, AxisClass, Family, Leaf, Product, Sum, restricted

Orders = Mapping[str, Tensor]


def reorder(tensor: Tensor, layout: Sequence[Axis], orders: Orders, needs: Mapping[str, tuple[str, ...]]) -> Tensor:
    """``tensor`` with every axis put in order; shares no memory with it where anything moves.

    layout: one expression an axis; orders: int64 ``[*rows, size]`` by class, on the tensor's device; needs: the classes that
    the rows of an order count, by class.
    """
    if not any(_moves(axis, orders) for axis in layout):
        return tensor
    for at, axis in enumerate(layout):
        if isinstance(axis, Product):
            split = tensor.reshape(*tensor.shape[:at], *(part.size for part in axis.parts), *tensor.shape[at + 1 :])
            inner = (*layout[:at], *axis.parts, *layout[at + 1 :])
            return reorder(split, inner, orders, needs).reshape(tensor.shape)
    for at, axis in enumerate(layout):
        if isinstance(axis, Sum):
            pieces = []
            for part, piece in zip(axis.parts, tensor.split([part.size for part in axis.parts], at), strict=True):
                inner = tuple(part if i == at else restricted(other, part) for i, other in enumerate(layout))
                pieces.append(reorder(piece, inner, orders, needs))
            return torch.cat(pieces, at)
    return _permute_leaves(tensor, layout, orders, needs)


def _permute_leaves(tensor: Tensor, layout: Sequence[Axis], orders: Orders, needs: Mapping[str, tuple[str, ...]]) -> Tensor:
    assert not any(isinstance(axis, Family) and _moves(axis, orders) for axis in layout), "a family without its key"
    places = [(axis.name, at) for at, axis in enumerate(layout) if isinstance(axis, Leaf) and axis.name in orders]
    while places:  # what depends on others goes first, while those still stand as they were
        asked = {need for name, _ in places for need in needs.get(name, ())}
        name, at = places.pop(next(i for i, (name, _) in enumerate(places) if name not in asked))
        order = orders[name]
        rows = needs.get(name, ())
        if not rows:
            tensor = tensor.index_select(at, order)
            continue
        where = [next(i for i, axis in enumerate(layout) if isinstance(axis, Leaf) and axis.name == row) for row in rows]
        shape = [1] * tensor.ndim
        shape[at] = order.shape[-1]
        for position, size in zip(where, order.shape, strict=False):
            shape[position] = size
        axes = [*where, at]
        index = order.permute(sorted(range(len(axes)), key=axes.__getitem__)).reshape(shape)
        tensor = torch.take_along_dim(tensor, index.expand_as(tensor), at)
    return tensor


def _moves(axis: Axis, orders: Orders) -> bool:
    if isinstance(axis, Leaf):
        return axis.name in orders
    return any(_moves(part, orders) for part in axis.parts)


def inverse(orders: Orders, needs: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The orders that put back what ``orders`` moved."""
    result = {}
    for name, order in orders.items():
        back = order.argsort(dim=-1)
        rows = tuple(Leaf(row, size) for row, size in zip(needs.get(name, ()), order.shape, strict=False))
        result[name] = reorder(back, (*rows, Leaf("", order.shape[-1])), orders, needs)
    return result


def needs_of(axes: Axes) -> dict[str, tuple[str, ...]]:
    """What the rows of each class's order count."""
    return {each.name: each.needs for each in axes.classes if each.needs}


def random_order(each: AxisClass, generator: torch.Generator) -> Tensor:
    """A uniformly random order of a class, int64 ``[*rows, size]``."""
    return torch.rand(*each.rows, each.size, generator=generator).argsort(dim=-1)
