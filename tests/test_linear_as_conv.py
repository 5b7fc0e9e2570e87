# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Linears as 1x1 convolutions: the same numbers, groups along axis 1, and only the weights that were asked for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import Attention
from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.capture.export import capture
from nm_compiler.graph import run, show_graph
from nm_compiler.passes.linear_as_conv import linear_as_conv

aten = torch.ops.aten


class Shaped(nn.Module):
    """A linear with a bias, one without, on as many axes as the input has."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 6)
        self.two = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def captured(model: nn.Module, *inputs: Tensor, **options: Any) -> GraphModule:
    return capture(model.eval(), inputs, {}, **options)[False][0]


def convolutions(gm: GraphModule) -> int:
    return sum(node.target is aten.conv2d.default for node in gm.graph.nodes)


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (2, 3, 5, 8)], ids=["2 axes", "3 axes", "4 axes"])
def test_the_numbers_are_those_of_the_linears_at_any_batch(shape: tuple[int, ...]) -> None:
    model = Shaped().double()
    gm = run(captured(model, torch.randn(shape, dtype=torch.double)), [linear_as_conv])
    assert convolutions(gm) == 2
    for batch in (shape[0], 7):
        x = torch.randn(batch, *shape[1:], dtype=torch.double)
        torch.testing.assert_close(gm(x)[0], model(x))


def test_two_dynamic_axes_keep_their_sizes() -> None:
    model = Shaped().double()
    program = torch.export.export(
        model, (torch.randn(3, 5, 8).double(),), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    )
    gm = program.module(check_guards=False)
    gm.__dict__["extras"] = {}
    gm = run(gm, [linear_as_conv])
    x = torch.randn(4, 9, 8).double()
    torch.testing.assert_close(gm(x), model(x))


def test_only_the_weights_that_were_asked_for_are_rewritten_and_the_model_is_left_alone() -> None:
    model = Shaped()
    gm = run(captured(model, torch.randn(3, 8)), [partial(linear_as_conv, include=("two.*",))])
    assert convolutions(gm) == 1
    assert set(model.state_dict()) == {"one.weight", "one.bias", "two.weight"}
    assert gm.two_weight_1x1.data_ptr() == model.two.weight.data_ptr()


def test_the_graph_is_as_read(golden: Callable[[str, str], None]) -> None:
    gm = captured(Attention(), torch.zeros(2, 6, dtype=torch.long))
    golden("linear_as_conv_attention", show_graph(run(gm, [partial(linear_as_conv, include=("qkv.*", "out.*"))])))
