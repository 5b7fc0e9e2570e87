"""Compute products of N:M weights on the CPU from packed weights.

    before                                             after
    %w = self.fc.weight            # [out, in], N:M    %v = self.fc_weight_values   # [1, tiles, steps, 16]
    %y = aten.linear(%x, %w, %b)   # [.., out]         %c = self.fc_weight_codes    # [1, tiles, words, 16]
                                                       %y = nm.packed_linear(%x, %v, %c, None, %b, None, [n, m], out, "")

    %y = aten.conv2d(%x, %w, %b, ..)                   %y = nm.packed_conv2d(%x, .., [kh, kw], stride, padding, dilation, ..)

A convolution with one axis of space gets a second one of size 1 around it, one with three goes through images of two
(`nm_compiler.runtime.native.volumes`). int8 values have ``scales`` beside them. The op is
`nm_compiler.runtime.native.ops`; `fuse_epilogues` then moves activations and additions into it. The model is not touched.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import value_of
from nm_compiler.graph import arguments_of
from nm_compiler.memory import give_back
from nm_compiler.rewrite import call, constant, replace
from nm_compiler.runtime.native.eligible import Conv, geometry, volume_of
from nm_compiler.runtime.native.ops import CONV2D, LINEAR
from nm_compiler.runtime.native.packing import Packed, pack
from nm_compiler.runtime.native.volumes import Images, Volume, through_images
from nm_compiler.runtime.products import Product

aten = torch.ops.aten
_LARGE = 1 << 20  # bytes of a weight after whose packing memory goes back to the system


def lower_cpu(gm: GraphModule, *, chosen: Collection[Product], values: torch.dtype | None = None) -> GraphModule:
    """Lower the products in ``chosen``, none of which has a reason against it.

    values: dtype of packed values, by default that of each weight.
    """
    known: dict[tuple[str, bool], list[Packed]] = {}
    nodes = {node.name: node for node in gm.graph.nodes}
    for product in chosen:
        node = nodes[product.node]
        read: Any = node.args[1]
        volume = volume_of(node)
        key = (product.read, volume is None or bool(volume.thin))
        if key not in known:
            weight = value_of(gm, read)
            site, dtype = product.site, values or weight.dtype
            parts = parts_of(weight, volume)
            known[key] = [pack(part, site.pattern, conv_groups=site.conv_groups, dtype=dtype) for part in parts]
            if weight.nbytes >= _LARGE:
                give_back()
        with gm.graph.inserting_before(node):
            result = _product(gm, node, read, known[key])
        replace(node, result)
    return gm


def parts_of(weight: Tensor, volume: Volume | None) -> list[Tensor]:
    """What is packed of a weight: it, or what the products of a convolution over three axes read of it."""
    return [weight] if volume is None else volume.parts(weight)


def _product(gm: GraphModule, node: Node, read: Node, packed: list[Packed]) -> Node:
    operands = [
        _operands(gm, each, read.name if len(packed) == 1 else f"{read.name}_{number}") for number, each in enumerate(packed)
    ]
    bias, data = _bias(gm, node), node.args[0]
    if node.target is aten.linear.default:
        return call(gm, LINEAR, (data, *operands[0], bias, None, *_sizes(packed[0]), ""), f"{node.name}_packed")
    conv, volume = geometry(node), volume_of(node)
    if volume is not None:
        return _volume(gm, node, volume, operands, packed, bias)
    assert conv is not None, "lower_cpu gets products without reasons against them"
    return _convolution(gm, node, packed[0], [*operands[0], bias, None, *_sizes(packed[0])], conv)


def _operands(gm: GraphModule, packed: Packed, name: str) -> list[Node | None]:
    parts = [("values", packed.values), ("codes", packed.codes), ("scales", packed.scales)]
    return [None if part is None else constant(gm, f"{name}_{kind}", part) for kind, part in parts]


def _sizes(packed: Packed) -> tuple[list[int], int]:
    return [packed.pattern.n, packed.pattern.m], packed.shape[0]


def _convolution(gm: GraphModule, node: Node, packed: Packed, operands: list[Any], conv: Conv) -> Node:
    data: Any = node.args[0]
    if conv.one_axis:
        data = gm.graph.call_function(aten.unsqueeze.default, (data, 2))
    kernel = [1, *packed.shape[2:]][-2:]
    arguments = (data, *operands, kernel, list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups, "")
    result = call(gm, CONV2D, arguments, f"{node.name}_packed")
    return gm.graph.call_function(aten.squeeze.dim, (result, 2)) if conv.one_axis else result


def _volume(
    gm: GraphModule, node: Node, volume: Volume, operands: list[list[Node | None]], packed: list[Packed], bias: Node | None
) -> Node:
    """Sums that go from one product to the next stay in float32, whatever the data is."""
    data: Any = node.args[0]
    dtype = data.meta["val"].dtype
    halves = len(packed) > 1 and dtype != torch.float32

    def called(op: Any, *args: Any, **kwargs: Any) -> Node:
        return gm.graph.call_function(op, args, kwargs)

    def product(part: int, images: Node, how: Images, added: Node | None) -> Node:
        arguments = (images, *operands[part], None if part else bias, added, *_sizes(packed[part]))
        places = (list(how.kernel), list(how.stride), list(how.padding), list(how.dilation), volume.groups, "")
        return call(gm, CONV2D, (*arguments, *places), f"{node.name}_packed")

    x = called(aten.to.dtype, data, torch.float32) if halves else data
    sizes = [size if isinstance(size, int) else None for size in data.meta["val"].shape]
    result: Node = through_images(volume, x, sizes, called, product)
    return called(aten.to.dtype, result, dtype) if halves else result


def _bias(gm: GraphModule, node: Node) -> Node | None:
    """In float32: what sums start with."""
    bias: Any = arguments_of(node)["bias"]
    if bias is None:
        return None
    value: Tensor = value_of(gm, bias)
    if value.dtype == torch.float32 and bias.op == "get_attr":
        return bias  # type: ignore[no-any-return]
    return constant(gm, f"{bias.name}_float", value.detach().float().contiguous())
