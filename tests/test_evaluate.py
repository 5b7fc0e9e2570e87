"""Values of nodes that depend on no input, in graphs deeper than Python's recursion and with values that are read twice."""

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from nm_compiler.evaluate import is_constant, value_of


def doubled(times: int, *, of_input: bool = False) -> tuple[GraphModule, Node]:
    """``x + x`` that many times: as many steps as additions, and twice as many ways from each to the next."""
    root, graph = nn.Module(), Graph()
    root.weight = nn.Parameter(torch.ones(2))
    data = graph.placeholder("x")
    node = data if of_input else graph.get_attr("weight")
    for _ in range(times):
        node = graph.call_function(torch.add, (node, node))
    graph.output(node)
    return GraphModule(root, graph), node


def test_a_chain_deeper_than_the_recursion_limit_is_a_constant_if_it_begins_with_one() -> None:
    for of_input in (False, True):
        _, last = doubled(2 * sys.getrecursionlimit(), of_input=of_input)
        assert is_constant(last) is not of_input


def test_what_is_read_twice_is_computed_once_and_let_go_when_it_was_read() -> None:
    gm, last = doubled(100)  # 2 ** 100 ways through it
    assert torch.equal(value_of(gm, last), torch.full((2,), 2.0**100))
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def noted(left: Tensor, right: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))
        result = left + right
        made.append(weakref.ref(result))
        return result

    for node in gm.graph.find_nodes(op="call_function", target=torch.add):
        node.target = noted
    result = value_of(gm, last)
    assert len(made) == 100
    assert most == 1
    assert made[-1]() is result
