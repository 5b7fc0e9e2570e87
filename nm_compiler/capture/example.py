"""From the calls of a part to inputs to capture it with: the smallest call, and which of its sizes are free."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.capture.export import by_name
from nm_compiler.capture.watching import PLAIN, Calls
from nm_compiler.errors import NMError
from nm_compiler.wording import dtype_name


def example(name: str, part: nn.Module, calls: Calls) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """args, kwargs and dynamic_shapes to lower a part with. Raises NMError for calls that give none."""
    if calls.least is None:
        raise NMError(
            f"{name} is a part that run= never calls: leave it out of parts=, or have run= call it. Where only its weights "
            "are used, or methods beside forward(), name the module around it, or the layers inside it"
        )
    if calls.autocast is not None:
        raise NMError(
            f"{name} is called under torch.autocast ({dtype_name(calls.autocast)}), and a lowered part has its own dtype: "
            f"lower the parts of model.to(torch.{dtype_name(calls.autocast)}), and use that without autocast, in run= too"
        )
    if calls.several:
        raise NMError(
            f"{name} is called in several ways ({calls.several}), and a graph knows one: name the layers inside it in parts="
        )
    leaves, spec = pytree.tree_flatten(calls.least)
    strange = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))), None)
    if strange is not None:
        raise NMError(
            f"{name} is called with a {type(strange).__name__}, which no graph takes: name the layers inside it in parts="
        )
    free = iter(_free(part, calls))
    axes = [next(free) if isinstance(leaf, Tensor) else frozenset[int]() for leaf in leaves]
    leaves = [at_least_two(leaf, its_axes) for leaf, its_axes in zip(leaves, axes, strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    shapes = torch.export.ShapesCollection()
    for leaf, its_axes in zip(leaves, axes, strict=True):
        if its_axes:
            shapes[leaf] = dict.fromkeys(sorted(its_axes), torch.export.Dim.AUTO)
    with by_name(part, kwargs):
        return args, kwargs, shapes.dynamic_shapes(part, args, kwargs) if any(axes) else None


def _free(part: nn.Module, calls: Calls) -> list[frozenset[int]]:
    """The axes of each tensor whose sizes are not fixed."""
    free = calls.varying()
    if len(free) != 1:
        return free
    axes = len(next(iter(calls.sizes[0])))
    images = any(weight.ndim > 2 for weight in part.parameters())
    return [free[0] | set(range(axes)[: 1 if images or axes == 1 else -1])]


def at_least_two(value: Tensor, axes: Collection[int]) -> Tensor:
    """``value`` with two of what it has one of along the free ``axes``: export would make a constant of a size of 1."""
    for axis in axes:
        if value.shape[axis] == 1:
            value = value.repeat_interleave(2, axis)
    return value
