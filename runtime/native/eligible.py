"""Which products the CPU kernels take, and how: the arguments of the packed op, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from nm_compiler.graph import arguments_of, per_axis
from nm_compiler.runtime.native.packing import MOST_M
from nm_compiler.runtime.native.volumes import Volume
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
    if node.target is not aten.linear.default and geometry(node) is None and volume_of(node) is None:
        found.append(
            f"{product.site.op} with this padding or number of axes, and the CPU kernels take one to three, padded evenly: "
            "pad the data first, or write it as a linear"
        )
    return tuple(found)


def geometry(node: Node) -> Conv | None:
    """Of a convolution over one or two axes of space; None if it has others, or the kernels cannot compute it."""
    axes, how = _axes(node), _how(node)
    if axes not in (1, 2) or how is None:
        return None
    strides, paddings, dilations, groups = how
    return Conv(_pair(strides, 1), _pair(paddings, 0), _pair(dilations, 1), groups, axes == 1)


def volume_of(node: Node) -> Volume | None:
    """Of a convolution over three axes of space; None if it has others, or the kernels cannot compute it."""
    how = _how(node)
    if _axes(node) != 3 or how is None:
        return None
    weight: Any = node.args[1]
    strides, paddings, dilations, groups = how
    return Volume(tuple(weight.meta["val"].shape[2:]), tuple(strides), tuple(paddings), tuple(dilations), groups)


def _how(node: Node) -> tuple[list[int], list[int], list[int], int] | None:
    """Stride, padding and dilation along every axis of space, and conv groups; None if it is turned or padded unevenly."""
    axes = _axes(node)
    if axes is None:
        return None
    given = arguments_of(node)
    if given.get("transposed"):
        return None
    padding, dilations = given["padding"], per_axis(given["dilation"], axes)
    if isinstance(padding, str):
        weight: Any = node.args[1]
        kernel = weight.meta["val"].shape[2:]
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        if any(amount % 2 for amount in total):
            return None
        padding = [amount // 2 for amount in total]
    paddings = [int(amount) for amount in per_axis(padding, axes)]
    return per_axis(given["stride"], axes), paddings, dilations, int(given["groups"])


def _axes(node: Node) -> int | None:
    """One to three of space, with a batch; None for anything else."""
    data: Any = node.args[0]
    weight: Any = node.args[1]
    axes = weight.meta["val"].ndim - 2
    return axes if axes in (1, 2, 3) and data.meta["val"].ndim == axes + 2 else None


def _pair(numbers: list[int], other: int) -> tuple[int, int]:
    """Along height and width; a single axis of space is the width, and ``other`` is the height's."""
    first, *rest = numbers
    return (first, rest[0]) if rest else (other, first)
