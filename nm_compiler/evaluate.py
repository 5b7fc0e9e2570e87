"""The value of a node that depends on nothing but parameters, buffers and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from nm_compiler.graph import getattr_path
from nm_compiler.ops.two_masks import TWO_MASKS, turned_back
from nm_compiler.ops.weights import BACKWARD
from nm_compiler.rewrite import masked_nodes
from nm_compiler.scaled import value_if_scaled
from nm_compiler.sharding import whole


def value_of(gm: GraphModule, node: Any) -> Any:
    """Compute ``node`` without gradients. An input of the graph among its ancestors is a broken invariant."""
    if node.op == "get_attr":
        value = getattr_path(gm, node.target)
        return value_if_scaled(whole(value)) if isinstance(value, Tensor) else value
    assert node.op == "call_function", f"%{node.name} depends on the input %{node}"
    with torch.no_grad():
        return node.target(*map_arg(node.args, lambda n: value_of(gm, n)), **map_arg(node.kwargs, lambda n: value_of(gm, n)))


def effective_weights(gm: GraphModule, name: str) -> tuple[Tensor | None, Tensor | None]:
    """What the graph multiplies with now: the forward weight W * F and, under Bi-Mask, the backward weight W * B."""
    forward = next(iter(masked_nodes(gm, name)), None)
    if forward is None:
        return None, None
    both: Any = forward.args[0]
    if both.target is TWO_MASKS:
        masked, turned = value_of(gm, both)
        return masked, turned_back(turned, None if both.args[1] is None else value_of(gm, both.args[1]))
    backward = next((u for u in forward.users if u.target in BACKWARD), None)
    return value_of(gm, forward), None if backward is None else value_of(gm, backward)


def is_constant(node: Node) -> bool:
    """Whether a node depends on parameters, buffers and constants alone."""
    return node.op == "get_attr" or (node.op == "call_function" and all(map(is_constant, node.all_input_nodes)))
