# mypy: disable-error-code="arg-type,assignment,attr-defined,index,no-any-return,operator,union-attr"
"""Dense convolutions activate while they write: the same numbers, and none that oneDNN would not compute in any case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.capture.export import capture_mode
from nm_compiler.graph import run, show_graph
from nm_compiler.passes.fuse_dense import fuse_dense
from nm_compiler.runtime.native.library import load

LAST = torch.channels_last
FUSED = torch.ops.mkldnn._convolution_pointwise.default
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


class Depthwise(nn.Module):
    """One depthwise convolution, and what is done with it."""

    def __init__(self, does: Callable[[Tensor], Any], **how: Any) -> None:
        super().__init__()
        self.conv, self.does = nn.Conv2d(8, 8, 3, **{"groups": 8, **how}), does

    def forward(self, x: Tensor) -> Any:
        return self.does(self.conv(x))


def fused(model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """The graph before and after."""
    before, gm = (capture_mode(model.eval(), (x,), {}, training=False)[0] for _ in range(2))
    return before, run(gm, [fuse_dense])


def calls(gm: Any) -> int:
    return sum(node.target is FUSED for node in gm.graph.nodes)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 9, 7).contiguous(memory_format=LAST) * 3


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": lambda y: functional.relu(y, inplace=True),
    "relu6": functional.relu6,
    "relu6 in place": lambda y: functional.relu6(y, inplace=True),
    "clamp": lambda y: y.clamp(0, 6),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
}


@pytest.mark.ci(here=["how0-relu", "how1-relu6", "how2-relu in place"])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize(
    "how", [{}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "padding": "same", "groups": 1}]
)
def test_an_activation_is_computed_as_it_was(name: str, how: dict[str, Any]) -> None:
    before, after = fused(Depthwise(ACTIVATIONS[name], **how), images())
    assert calls(after) == 1
    assert sum(node.op == "call_function" for node in after.graph.nodes) == 1
    for batch in (1, 2, 5):
        x = images(batch)
        (mine,), (other,), (in_rows,) = after(x), before(x), after(x.contiguous())
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(in_rows, other, rtol=1e-5, atol=1e-5)
        assert mine.stride() == other.stride()


def test_the_graph_reads_as_before_without_the_activation(golden: Callable[[str, str], None]) -> None:
    golden("fuse_dense_depthwise", show_graph(fused(Depthwise(functional.relu6, padding=1), images())[1]))


STAYS: dict[str, Callable[[Tensor], Any]] = {
    "no activation": lambda y: y * 2,
    "read twice": lambda y: (torch.relu(y), y),
    "another range": lambda y: y.clamp(0, 5),
    "an activation that is not known": torch.sigmoid,
    "written in between": lambda y: torch.relu(y.add_(1)),
}


@pytest.mark.parametrize("case", list(STAYS))
def test_whatever_else_stands_behind_it_stays(case: str) -> None:
    before, after = fused(Depthwise(STAYS[case]), images())
    assert calls(after) == 0
    assert show_graph(after) == show_graph(before)


@pytest.mark.parametrize("case", ["rows", "float64", "one axis"])
def test_what_onednn_would_not_compute_this_way_stays(case: str) -> None:
    x, model = images(), Depthwise(torch.relu)
    if case == "rows":
        x = x.contiguous()
    elif case == "float64":
        x, model = x.double(), model.double()
    else:
        x, model.conv = torch.randn(2, 8, 9), nn.Conv1d(8, 8, 3)
    assert calls(fused(model, x)[1]) == 0


@pytest.mark.ci
@pytest.mark.skipif(isinstance(load(), str), reason=f"no CPU kernels here: {load()}")
def test_a_lowered_network_runs_it_also_compiled_and_exported() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    x = images()
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude(), include=["*"])).eval()
    lowered = nm.lower(model, (x,), backend="cpu", force=["*"])
    assert calls(lowered.run) == 1
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(lowered(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.compile(lowered, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
        exported = torch.export.export(lowered, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)
