"""Fold a batch norm in evaluation mode into the convolution before it.

    before                                                       after
    %y = aten.conv2d(%x, %w, %b, ...)                            %v = self.conv_weight_folded   # w * g / sqrt(var + eps)
    %z = aten.batch_norm(%y, %g, %h, %mean, %var, False, ...)    %c = self.conv_weight_folded_bias
                                                                 %z = aten.conv2d(%x, %v, %c, ...)

One factor an output channel, so zeros stay zeros and an N:M weight stays N:M. The model is not touched: the folded
weights are constants of the graph, which can wait to be computed until they are read (`nm_compiler.scaled`). Only a
convolution that nobody else reads, with constant weights, is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import is_constant, value_of
from nm_compiler.graph import arguments_of
from nm_compiler.rewrite import constant, discard, unused, weight_of
from nm_compiler.scaled import Scaled
from nm_compiler.sites.uses import CONVS

aten = torch.ops.aten


def fold_batchnorm(
    gm: GraphModule, *, exact: Mapping[str, Tensor] | None = None, own: bool = False, later: bool = False
) -> GraphModule:
    """Fold where the batch norm has constant statistics and is the convolution's only reader.

    exact: parameters and buffers by name in a wider dtype than the graph's, to fold with before rounding.
    own: the graph's state belongs to nobody else, so that what was folded is let go at once.
    later: folded weights are `Scaled` constants, computed each time that they are read, until `nm_compiler.scaled.keep`.
    """
    exact = exact or {}
    for norm in [node for node in gm.graph.nodes if node.target is aten.batch_norm.default]:
        product = norm.args[0]
        if isinstance(product, Node) and _foldable(norm, product):
            _fold(gm, norm, product, exact, later=later)
            discard(gm, norm, own=own)
    return gm


def _foldable(norm: Node, product: Node) -> bool:
    training, statistics = norm.args[5], norm.args[3:5]
    if training or any(s is None for s in statistics) or product.target not in CONVS or len(product.users) != 1:
        return False
    if arguments_of(product).get("transposed"):
        return False
    constants = [arg for arg in (*product.args[1:3], *norm.args[1:5]) if isinstance(arg, Node)]
    return all(is_constant(node) for node in constants)


def _fold(gm: GraphModule, norm: Node, product: Node, exact: Mapping[str, Tensor], *, later: bool) -> None:
    weight = _value(gm, product.args[1], exact)
    bias = _value(gm, arguments_of(product)["bias"], exact)
    gain, shift, mean, variance = (_value(gm, arg, exact) for arg in norm.args[1:5])
    assert weight is not None
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance.double() + float(norm.args[7]))  # type: ignore[arg-type]
    scale = scale if gain is None else scale * gain.double()
    offset = (0 if bias is None else bias.double()) - mean.double()
    offset = offset * scale + (0 if shift is None else shift.double())
    dtype, source = _dtype(product.args[1]), weight_of(product.args[1])  # type: ignore[arg-type]
    name = unused(gm, f"{product.args[1]}_folded")  # a convolution may be called several times, each with its own batch norm
    with gm.graph.inserting_before(product):
        folded = Scaled(weight, scale, dtype)
        new_weight = constant(gm, name, folded if later else folded.value())
        new_bias = constant(gm, unused(gm, f"{name}_bias"), offset.to(dtype))
        rest = {name: value for name, value in product.kwargs.items() if name != "bias"}
        new = gm.graph.call_function(product.target, (product.args[0], new_weight, new_bias, *product.args[3:]), rest)  # type: ignore[arg-type]
    if source is not None:
        new_weight.meta["weight"] = source
    new.meta = dict(norm.meta)
    norm.replace_all_uses_with(new)


def _dtype(node: Any) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _value(gm: GraphModule, arg: Any, exact: Mapping[str, Tensor]) -> Tensor | None:
    if arg is None:
        return None
    value: Tensor = exact[arg.target] if arg.op == "get_attr" and arg.target in exact else value_of(gm, arg)
    return value.detach()
