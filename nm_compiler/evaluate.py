"""The value of a node that depends on nothing but parameters, buffers and constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from nm_compiler.graph import getattr_path
from nm_compiler.ops.two_masks import TWO_MASKS, turned_back
from nm_compiler.ops.weights import makes_backward
from nm_compiler.rewrite import masked_nodes
from nm_compiler.scaled import value_if_scaled
from nm_compiler.state.sharding import whole


def value_of(gm: GraphModule, node: Node) -> Any:
    """Compute ``node`` without gradients. An input of the graph among its ancestors is a broken invariant."""
    order, values = _and_ancestors(node), dict[Node, Any]()
    left = Counter(each for one in order for each in one.all_input_nodes)
    for one in order:
        values[one] = _value(gm, one, values)
        for each in one.all_input_nodes:
            left[each] -= 1
            if not left[each]:
                del values[each]
    return values[node]


def _value(gm: GraphModule, node: Node, values: Mapping[Node, Any]) -> Any:
    if node.op == "get_attr":
        value = getattr_path(gm, node.target)
        return value_if_scaled(whole(value)) if isinstance(value, Tensor) else value
    assert node.op == "call_function", f"a weight depends on the input %{node}"
    function: Any = node.target
    with torch.no_grad():
        return function(*map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__))


def _and_ancestors(node: Node) -> list[Node]:
    """What a node is computed from, each once and behind its own inputs, and the node itself. Graphs may be deep."""
    order, seen, stack = list[Node](), set[Node](), [(node, False)]
    while stack:
        one, inputs_are_there = stack.pop()
        if inputs_are_there:
            order.append(one)
        elif one not in seen:
            seen.add(one)
            stack.append((one, True))
            stack += [(each, False) for each in reversed(one.all_input_nodes)]
    return order


def effective_weights(gm: GraphModule, name: str) -> tuple[Tensor | None, Tensor | None]:
    """What the graph multiplies with now: the forward weight W * F and, where there is one, the backward weight W * B."""
    forward = next(iter(masked_nodes(gm, name)), None)
    if forward is None:
        return None, None
    both: Any = forward.args[0]
    if both.target is TWO_MASKS:
        masked, turned = value_of(gm, both)
        return masked, turned_back(turned, None if both.args[1] is None else value_of(gm, both.args[1]))
    backward = next((u for u in forward.users if makes_backward(u.target)), None)
    return value_of(gm, forward), None if backward is None else value_of(gm, backward)


def is_constant(node: Node) -> bool:
    """Whether a node depends on parameters, buffers and constants alone, and on none that the graph writes to.

    `nm_compiler.written.mark` says which these are.
    """
    seen, stack = {node}, [node]
    while stack:
        one = stack.pop()
        if one.op not in ("get_attr", "call_function") or "written" in one.meta:
            return False
        fresh = [each for each in one.all_input_nodes if each not in seen]
        seen.update(fresh)
        stack += fresh
    return True
