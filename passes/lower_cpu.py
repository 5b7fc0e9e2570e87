"""Compute products of N:M weights on the CPU from packed weights.

    before                                             after
    %w = self.fc.weight            # [out, in], N:M    %v = self.fc_weight_values   # [1, tiles, steps, 16]
    %y = aten.linear(%x, %w, %b)   # [.., out]         %c = self.fc_weight_codes    # [1, tiles, words, 16]
                                                       %y = nm.packed_linear(%x, %v, %c, None, %b, None, [n, m], out, "")

    %y = aten.conv2d(%x, %w, %b, ..)                   %y = nm.packed_conv2d(%x, .., [kh, kw], stride, padding, dilation, ..)

A convolution with one axis of space gets a second one of size 1 around it. int8 values have ``scales`` beside them. The op is
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
from nm_compiler.runtime.native.eligible import Conv, geometry
from nm_compiler.runtime.native.ops import CONV2D, LINEAR
from nm_compiler.runtime.native.packing import Packed, pack
from nm_compiler.runtime.products import Product

aten = torch.ops.aten
_LARGE = 1 << 20  # bytes of a weight after whose packing memory goes back to the system


def lower_cpu(gm: GraphModule, *, chosen: Collection[Product], values: torch.dtype | None = None) -> GraphModule:
    """Lower the products in ``chosen``, none of which has a reason against it.

    values: dtype of packed values, by default that of each weight.
    """
    known: dict[str, Packed] = {}
    nodes = {node.name: node for node in gm.graph.nodes}
    for product in chosen:
        node = nodes[product.node]
        read: Any = node.args[1]
        if product.read not in known:
            weight = value_of(gm, read)
            site, dtype = product.site, values or weight.dtype
            known[product.read] = pack(weight, site.pattern, conv_groups=site.conv_groups, dtype=dtype)
            if weight.nbytes >= _LARGE:
                give_back()
        with gm.graph.inserting_before(node):
            result = _product(gm, node, read, known[product.read])
        replace(node, result)
    return gm


def _product(gm: GraphModule, node: Node, read: Node, packed: Packed) -> Node:
    parts = [("values", packed.values), ("codes", packed.codes), ("scales", packed.scales)]
    operands: list[Any] = [None if part is None else constant(gm, f"{read.name}_{name}", part) for name, part in parts]
    operands += [_bias(gm, node), None, [packed.pattern.n, packed.pattern.m], packed.shape[0]]
    if node.target is aten.linear.default:
        return call(gm, LINEAR, (node.args[0], *operands, ""), f"{node.name}_packed")
    conv = geometry(node)
    assert conv is not None, "lower_cpu gets products without reasons against them"
    return _convolution(gm, node, packed, operands, conv)


def _convolution(gm: GraphModule, node: Node, packed: Packed, operands: list[Any], conv: Conv) -> Node:
    data: Any = node.args[0]
    if conv.one_axis:
        data = gm.graph.call_function(aten.unsqueeze.default, (data, 2))
    kernel = [1, *packed.shape[2:]][-2:]
    arguments = (data, *operands, kernel, list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups, "")
    result = call(gm, CONV2D, arguments, f"{node.name}_packed")
    return gm.graph.call_function(aten.squeeze.dim, (result, 2)) if conv.one_axis else result


def _bias(gm: GraphModule, node: Node) -> Node | None:
    """In float32: what sums start with."""
    bias: Any = arguments_of(node)["bias"]
    if bias is None:
        return None
    value: Tensor = value_of(gm, bias)
    if value.dtype == torch.float32 and bias.op == "get_attr":
        return bias  # type: ignore[no-any-return]
    return constant(gm, f"{bias.name}_float", value.detach().float().contiguous())
