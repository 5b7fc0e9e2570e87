"""Which products the CPU kernels take, and how: the arguments of the packed op, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from nm_compiler.graph import arguments_of, per_axis
from nm_compiler.runtime.native.packing import MOST_M
from nm_compiler.runtime.products import Product
from nm_compiler.wording import dtype_name

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Conv:
    """What a convolution is called with besides its weight and bias, for two axes of space. one_axis: it has one."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    one_axis: bool


def reasons(product: Product, node: Node) -> tuple[str, ...]:
    """Every reason why the product stays dense; empty if the kernels take it."""
    found = []
    if product.site.pattern.m > MOST_M:
        found.append(
            f"M = {product.site.pattern.m}, and the CPU kernels take M up to {MOST_M}: choose a pattern with a smaller M"
        )
    if product.dtype not in DTYPES:
        found.append(f"{dtype_name(product.dtype)}, and the CPU kernels take float32 and bfloat16: say dtype=torch.float32")
    if node.target is not aten.linear.default and geometry(node) is None:
        found.append(
            f"{product.site.op} with this padding or number of axes, and the CPU kernels take one or two axes, padded evenly: "
            "pad the data first, or write it as a linear"
        )
    return tuple(found)


def geometry(node: Node) -> Conv | None:
    """Of a convolution; None if the kernels cannot compute it."""
    axes = _axes(node)
    if axes is None:
        return None
    given = arguments_of(node)
    if given.get("transposed"):
        return None
    stride, padding, dilation = given["stride"], given["padding"], given["dilation"]
    weight: Any = node.args[1]
    kernel = weight.meta["val"].shape[2:]
    strides, dilations = _pair(stride, axes), _pair(dilation, axes)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(per_axis(dilation, axes), kernel, strict=True)]
        if any(amount % 2 for amount in total):
            return None
        padding = [amount // 2 for amount in total]
    paddings = (0, int(per_axis(padding, 1)[0])) if axes == 1 else _pair(padding, 2)
    return Conv(strides, paddings, dilations, int(given["groups"]), axes == 1)


def _axes(node: Node) -> int | None:
    """One or two of space, with a batch; None for anything else."""
    data: Any = node.args[0]
    weight: Any = node.args[1]
    axes = weight.meta["val"].ndim - 2
    return axes if axes in (1, 2) and data.meta["val"].ndim == axes + 2 else None


def _pair(value: Any, axes: int) -> tuple[int, int]:
    """Along height and width; a single axis of space is the width."""
    first, *rest = per_axis(value, axes)
    return (first, rest[0]) if axes == 2 else (1, first)
