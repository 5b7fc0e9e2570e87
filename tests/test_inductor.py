"""What inductor is told about our ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from nm_compiler.live.inductor import MasksFirst, compiled

NM, ATEN = torch.ops.nm, torch.ops.aten


def backward_of_two(product: Any) -> Graph:
    """Masks right before the products that read them."""
    graph = Graph()
    grad, x, masked, order = (graph.placeholder(name) for name in ("grad", "x", "masked", "order"))
    for _ in range(2):
        grad = graph.call_function(ATEN.relu.default, (grad,))
        weight = graph.call_function(NM.backward_weight.default, (masked, order, 2, 4, [0, 2, 3, 1]))
        grad = graph.call_function(product, (grad, x, weight))
    graph.output(grad)
    return graph


def targets(graph: Graph) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]


def test_backward_weights_of_convolutions_come_first_and_in_their_order() -> None:
    graph = backward_of_two(ATEN.convolution_backward.default)
    before = [node for node in graph.nodes if node.target is NM.backward_weight.default]
    MasksFirst()(graph)
    graph.lint()
    assert targets(graph) == ["backward_weight"] * 2 + ["relu", "convolution_backward"] * 2
    assert [node for node in graph.nodes if node.target is NM.backward_weight.default] == before


def test_those_of_linears_and_of_weights_that_the_graph_makes_stay_where_they_are() -> None:
    linears = backward_of_two(ATEN.mm.default)
    expected = targets(linears)
    MasksFirst()(linears)
    assert targets(linears) == expected
    made = backward_of_two(ATEN.convolution_backward.default)
    masked: Node = next(node for node in made.nodes if node.name == "masked")
    with made.inserting_before(next(node for node in made.nodes if node.op == "call_function")):
        again = made.call_function(NM.srste_weight.default, (masked, 2, 4, 1, 0.0))
    masked.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    expected = targets(made)
    MasksFirst()(made)
    assert targets(made) == expected


def test_the_pass_is_known_to_inductors_caches() -> None:
    assert MasksFirst().uuid() == MasksFirst().uuid() is not None


def test_a_pass_of_the_users_own_is_not_replaced() -> None:
    given: list[dict[str, Any]] = []

    def backend(gm: Any, inputs: Any, *, config_patches: dict[str, Any]) -> Any:
        given.append(config_patches)
        return gm

    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    compiled(backend, gm, [])
    with torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: None):
        compiled(backend, gm, [])
    assert isinstance(given[0]["post_grad_custom_post_pass"], MasksFirst)
    assert given[1] == {}
