"""Orders from outside: checked against the classes they are meant for, before anything is permuted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nm_compiler.axes.reorder import random_order
from nm_compiler.axes.result import Axes, AxisClass
from nm_compiler.errors import NMError
from nm_compiler.wording import dtype_name


def checked(axes: Axes, orders: Mapping[str, Any]) -> dict[str, Tensor]:
    """Orders by class name, int64 ``[*rows, size]`` each.

    orders: by the name of a class, or of a weight axis that consists of one class alone (``"fc1.weight[0]"``); anything that
    `torch.as_tensor` takes, ``[size]`` for the same order in all rows. Raises NMError for an axis that is unknown or pinned
    or named twice, and for an order that is none.
    """
    result: dict[str, Tensor] = {}
    for name, given in orders.items():
        each = _class(axes, name)
        if each.name in result:
            raise NMError(
                f"two orders for the axis class {each.name}, one of them as {name!r}: they are permuted by one order"
            )
        result[each.name] = _order(each, name, given)
    return result


def random_orders(axes: Axes, seed: int) -> dict[str, Tensor]:
    """A random order of every free class; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {each.name: random_order(each, generator) for each in axes.free}


def _class(axes: Axes, name: str) -> AxisClass:
    try:
        each = axes[name]
    except KeyError:
        known = [each.name for each in axes.free]
        near = difflib.get_close_matches(str(name), known, 3) or known[:3]
        raise NMError(f"order={{{name!r}: ...}} names no axis of this model; axes are named like {', '.join(near)}. "
                      "nm.show_axes(model, inputs) lists them") from None  # fmt: skip
    if each.pinned:
        raise NMError(f"the axis {name} of size {each.size} is pinned and keeps its order: {each.pinned}")
    return each


def _order(each: AxisClass, name: str, given: Any) -> Tensor:
    try:
        order = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise NMError(f"the order of {name} is no array of numbers: {error}") from error
    shape = (*each.rows, each.size)
    wanted = f"int64 [{', '.join(map(str, shape))}]" + (f" or [{each.size}]" if each.rows else "")
    if order.is_floating_point() or order.dtype == torch.bool or tuple(order.shape) not in (shape, shape[-1:]):
        raise NMError(f"the order of {name} is {dtype_name(order.dtype)} {list(order.shape)}; it must be {wanted}")
    order = order.to(torch.int64).expand(shape).contiguous()
    wrong = (order.sort(dim=-1).values != torch.arange(each.size)).any(dim=-1)
    if bool(wrong.any()):
        row = f" in row {wrong.reshape(-1).nonzero()[0].item()}" if each.rows else ""
        raise NMError(f"the order of {name} is no permutation of 0 ... {each.size - 1}{row}: every number must occur once")
    return order
