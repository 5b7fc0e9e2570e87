# mypy: disable-error-code="arg-type,assignment,attr-defined,no-untyped-call,operator,union-attr"
"""nm.verify of a graph that torchao has quantised (pt2e): its integers are looked at, not the floats that it keeps beside them."""

import pytest
import torch
from models import MLP
from torch import nn
from torch.fx import Graph, GraphModule

import nm_compiler as nm

pytest.importorskip("torch.ao.quantization.fx._decomposed")  # registers the ops


def quantised(model: MLP, zero: int) -> GraphModule:
    """As `convert_pt2e` leaves it: the second weight by channel, the third as a whole, with ``zero`` for 0."""
    ops, root = torch.ops.quantized_decomposed, nn.Module()
    root.fc1, root.fc2, root.fc3 = model.fc1, model.fc2, model.fc3
    scale, zeros = model.fc2.weight.detach().abs().amax(1) / 100, torch.full((16,), zero)
    for name, value in {
        "_scale_1": scale,
        "_zero_point_1": zeros,
        "_frozen_param1": ops.quantize_per_channel(model.fc2.weight, scale, zeros, 0, -128, 127, torch.int8),
        "_frozen_param2": ops.quantize_per_tensor(model.fc3.weight, 0.01, zero, -128, 127, torch.int8),
    }.items():
        root.register_buffer(name, value.detach())
    graph = Graph(root)
    first, x = graph.get_attr("fc1.weight"), graph.placeholder("x")
    second = graph.call_function(
        ops.dequantize_per_channel.default,
        (*map(graph.get_attr, ("_frozen_param1", "_scale_1", "_zero_point_1")), 0, -128, 127, torch.int8),
    )
    third = graph.call_function(
        ops.dequantize_per_tensor.default, (graph.get_attr("_frozen_param2"), 0.01, zero, -128, 127, torch.int8)
    )
    for weight in (first, second, third):
        x = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    graph.output(x)
    gm = GraphModule(root, graph)
    gm.fc2, gm.fc3 = model.fc2, model.fc3  # it keeps them, though it reads only biases of them
    return gm


@pytest.mark.parametrize("zero", [0, 7])
def test_verify_looks_at_the_integers_of_a_quantised_graph(zero: int) -> None:
    model = MLP()
    frozen = nm.freeze(nm.compile(model, (torch.randn(4, 8),), include="fc3.weight", method=nm.Magnitude()))
    gm = quantised(frozen, zero)
    found = nm.verify(gm)
    assert [weight.name for weight in found.weights] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert set(found.satisfied) == {"fc2.weight", "fc3.weight"}
    assert [row.status for row in nm.report(gm).rows] == ["dense", "sparse", "sparse"]
    gm._frozen_param1.add_(1)  # where the floats still have their zeros
    assert set(nm.verify(gm).satisfied) == {"fc3.weight"}
    del gm.fc2
    assert {weight.name for weight in nm.verify(gm).weights} == {"fc1.weight", "fc3.weight", "_frozen_param1"}
