# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,dict-item,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""nm.lower(backend="cpu"): packed products, what is fused into them, what is measured, reported and refused."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Attention, ConvNet, Grouped, Matmuls, Stepping, example
from packed_products import unpack
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.graph import run, show_graph
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.backends import cpu
from nm_compiler.runtime.choose import Timing
from nm_compiler.runtime.native import library as library_module
from nm_compiler.runtime.native.eligible import Conv
from nm_compiler.runtime.native.library import Library, load
from nm_compiler.runtime.native.measuring import (
    _conv_prepacked,
    _conv_ways,
    _linear_prepacked,
    _linear_ways,
    _sparse,
    timed,
)
from nm_compiler.runtime.native.ops import CONV2D, LINEAR
from nm_compiler.runtime.native.packing import pack
from nm_compiler.runtime.native.volumes import Volume
from nm_compiler.runtime.native.whole import Whole, compared
from nm_compiler.solvers.masks import masked

Golden = Callable[[str, str], None]
ROOT = Path(__file__).parents[1]
needs_kernels = pytest.mark.skipif(isinstance(load(), str), reason=f"no CPU kernels here: {load()}")


@pytest.mark.required
def test_the_kernels_were_built_and_load() -> None:
    if isinstance(load(), str):
        pytest.skip(str(load()))
    assert load().isa in ("avx512", "avx2", "portable")


def frozen(model: nn.Module, x: Any, pattern: str = "2:4", **options: Any) -> nn.Module:
    return nm.freeze(nm.compile(model, (x,), pattern=pattern, method=nm.Magnitude(), **options)).eval()


def forced(model: nn.Module, x: Any, **options: Any) -> Any:
    return nm.lower(model, (x,), backend="cpu", force=["*"], **options)


def packed_nodes(lowered: Any) -> list[Any]:
    return [node for node in lowered.run.graph.nodes if node.target in (LINEAR, CONV2D)]


def rows(lowered: Any) -> dict[str, Any]:
    return {row.name: row for row in nm.report(lowered).rows}


# -- the graph --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """What the backend's passes make of the graph, one by one: the pass, the graph as text, and its outputs."""
    found = []

    def recorded(gm: Any, passes: list[Any]) -> Any:
        for each in passes:
            gm = run(gm, [each])
            found.append((getattr(each, "func", each).__name__, show_graph(gm), gm))
        return gm

    monkeypatch.setattr(cpu, "run", recorded)
    return found


def after(stages: list[tuple[str, str, Any]], name: str) -> str:
    """The graph as text after the last run of a pass."""
    return next(text for each, text, _ in reversed(stages) if each == name)


@needs_kernels
@pytest.mark.parametrize("kind", [ConvNet, Attention, Grouped, Matmuls], ids=lambda kind: kind.__name__.lower())
def test_the_passes_of_the_backend_compute_the_same_and_look_as_read(kind: Any, stages: Any, golden: Golden) -> None:
    model = kind()
    x = example(model)
    model = frozen(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lowered = forced(model, x)
    assert lowered.error < 1e-5
    assert [name for name, _, _ in stages] == [
        "lower_cpu", "left_products", "unflatten_tokens", "turned_linears", "fuse_epilogues", "huge_pages",
        "pool_channels_last", "fuse_dense",
    ]  # fmt: skip
    for name in ("lower_cpu", "fuse_epilogues"):
        golden(f"{name}_{kind.__name__.lower()}", after(stages, name))
    assert after(stages, "fuse_dense") == after(stages, "fuse_epilogues"), "there is nothing to pool or to fuse"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is not touched"
    for batch in (1, 5):
        torch.testing.assert_close(lowered(example(model, batch, 1)), model(example(model, batch, 1)), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_max_pooling_of_rows_runs_with_channels_innermost_and_one_that_lies_so_stays(stages: Any, golden: Golden) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(8, 8, 1), nn.MaxPool2d((2, 1)), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(2, 3, 11, 9)
    model = frozen(net, x)
    lowered = forced(model, x)
    golden("pool_channels_last_net", after(stages, "pool_channels_last"))
    for batch in (1, 4):
        data = torch.randn(batch, 3, 11, 9)
        torch.testing.assert_close(lowered(data), model(data), rtol=1e-5, atol=1e-5)
    assert lowered(x).is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    nm.lower(model.to(memory_format=torch.channels_last), (last,), backend="cpu", force=["*"])
    assert after(stages, "pool_channels_last") == after(stages, "huge_pages")


class Net(nn.Module):
    """A sparse linear in the middle of whatever a case does."""

    def __init__(self, then: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.fc, self.other, self.then = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), then
        self.drop, self.conv = nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.stem(x))


def added_in_place(net: Any, h: Tensor) -> Tensor:
    y = net.fc(h)
    y += h
    return torch.relu_(y)


def read_twice(net: Any, h: Tensor) -> Tensor:
    y = net.fc(h)
    return torch.relu(y) * y


def written_before_the_activation(net: Any, h: Tensor) -> Tensor:
    y = net.fc(h)
    h.mul_(2)
    return torch.relu(y) * h


def written_between_addition_and_activation(net: Any, h: Tensor) -> Tensor:
    r = torch.tanh(h)
    y = net.fc(h) + r
    r.mul_(2)
    return torch.relu(y) * r


def turned(net: Any, h: Tensor) -> Tensor:
    return torch.relu(net.fc(h).view(-1, 4, 4) + h.view(-1, 4, 4))


FUSED: dict[str, tuple[Any, bool, str]] = {  # forward, whether a residual is added, the activation
    "nothing": (lambda net, h: net.fc(h), False, ""),
    "relu": (lambda net, h: torch.relu(net.fc(h)), False, "relu"),
    "relu in place": (lambda net, h: functional.relu(net.fc(h), inplace=True), False, "relu"),
    "silu": (lambda net, h: functional.silu(net.fc(h)), False, "silu"),
    "gelu": (lambda net, h: functional.gelu(net.fc(h)), False, "gelu"),
    "gelu of tanh": (lambda net, h: functional.gelu(net.fc(h), approximate="tanh"), False, "gelu_tanh"),
    "relu6": (lambda net, h: functional.relu6(net.fc(h)), False, "relu6"),
    "relu6 in place": (lambda net, h: functional.relu6(net.fc(h), inplace=True), False, "relu6"),
    "a clamp that is relu6": (lambda net, h: net.fc(h).clamp(0, 6), False, "relu6"),
    "another clamp": (lambda net, h: net.fc(h).clamp(-1, 1), False, ""),
    "hardswish": (lambda net, h: functional.hardswish(net.fc(h), inplace=True), False, "hardswish"),
    "an addition": (lambda net, h: net.fc(h) + h, True, ""),
    "an addition from the other side": (lambda net, h: h + net.fc(h), True, ""),
    "an addition in place, then relu": (added_in_place, True, "relu"),
    "dropout, an addition, silu": (lambda net, h: functional.silu(net.drop(net.fc(h)) + h), True, "silu"),
    "a shape, an addition, relu": (turned, True, "relu"),
    "relu, and then an addition": (lambda net, h: torch.relu(net.fc(h)) + h, False, "relu"),
    "tanh": (lambda net, h: torch.tanh(net.fc(h)), False, ""),
    "a number": (lambda net, h: net.fc(h) + 1.0, False, ""),
    "a row for all": (lambda net, h: net.fc(h) + h[:1], False, ""),
    "its one row for all": (lambda net, h: net.fc(h[:1]) + h, False, ""),
    "alpha": (lambda net, h: torch.add(net.fc(h), h, alpha=2), False, ""),
    "into the other operand": (lambda net, h: h.add_(net.fc(h)), False, ""),
    "itself": (lambda net, h: (lambda y: y + y)(net.fc(h)), False, ""),
    "another dtype": (lambda net, h: net.fc(h) + h.double(), False, ""),
    "read twice": (read_twice, False, ""),
    "its input is written before the activation": (written_before_the_activation, False, ""),
    "what is added is written before the activation": (written_between_addition_and_activation, True, ""),
    "one of two products": (lambda net, h: torch.relu(net.fc(h) + net.other(h)), True, "relu"),
}  # fmt: skip


@pytest.mark.ci(here=["relu", "gelu", "an addition", "read twice", "is written"])
@needs_kernels
@pytest.mark.parametrize("case", list(FUSED))
def test_what_follows_a_product_is_fused_where_that_changes_nothing(case: str, stages: Any) -> None:
    forward, residual, activation = FUSED[case]
    model, x = Net(forward), torch.randn(6, 8)
    model = frozen(model, x, include=["*"])
    lowered = forced(model, x)
    assert lowered.error < 1e-5
    for batch in (2, 7):
        given = torch.randn(batch, 8)
        plain, wanted = stages[0][2](given)[0], model(given)
        torch.testing.assert_close(plain, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lowered(given), wanted, rtol=1e-5, atol=1e-5)
    kept = [node for node in packed_nodes(lowered) if str(node.args[1].target) != "stem_weight_values"]
    with_residual = [node for node in kept if node.args[5] is not None]
    assert len(with_residual) == residual, "one of them at most"
    assert {node.args[-1] for node in with_residual or kept} == {activation}


@needs_kernels
def test_a_residual_behind_a_shape_of_two_dynamic_axes_is_left_where_it_is() -> None:
    model = Net(lambda net, h: torch.relu(net.conv(h.unflatten(1, (4, -1))).flatten(2) + h.unflatten(1, (4, -1)).flatten(2)))
    model.stem = nn.Identity()
    x = torch.randn(2, 4 * 5, 6)
    model = frozen(model, x, include=["conv*"], dynamic_shapes=None)
    lowered = nm.lower(
        model, (x,), backend="cpu", force=["*"], dynamic_shapes={"x": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}}
    )
    for shape in ((2, 20, 6), (3, 20, 9)):
        given = torch.randn(shape)
        torch.testing.assert_close(lowered(given), model(given), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_linears_take_data_of_any_axes_as_it_lies_and_what_is_added_too() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.last = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.second(torch.relu(self.first(x)))  # [B, 2, 3, 8]
            y = y + self.third(y.transpose(1, 2)).transpose(1, 2)  # not contiguous
            return self.last(y.flatten(1, 2))  # stays dense

    model, x = Mixed(), torch.randn(4, 2, 3, 8)
    model = frozen(model, x, include=["first*", "second*", "third*"], exclude=["last*"])
    lowered = forced(model, x)
    assert len(packed_nodes(lowered)) == 3
    assert [str(node.target) for node in lowered.run.graph.nodes if "reshape" in str(node.target)] == []
    assert [node.args[5] is not None for node in packed_nodes(lowered)] == [False, True, False]
    for batch in (1, 5):
        given = torch.randn(batch, 2, 3, 8)
        torch.testing.assert_close(lowered(given), model(given), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("options", [{"force": ["*"]}, {}], ids=["forced", "measured"])
def test_convolutions_over_as_many_positions_as_data_tell_are_lowered(options: Any, tmp_path: Path) -> None:
    class Selecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.plane, self.head = (
                nn.Linear(16, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            y = y[x[:, 0] > 0].t().contiguous()[None]  # [1, 16, as many as there are]
            return self.head(self.plane(torch.relu(self.conv(y))[..., None, :])).flatten()

    model, x = Selecting(), torch.randn(12, 16)
    model = frozen(model, x, include=["conv*", "plane*"])
    lowered = nm.lower(model, (x,), backend="cpu", options={"cache": tmp_path / "choices.json"}, **options)
    for rows in (5, 12):
        given = torch.randn(rows, 16)
        given[0, 0] = 1.0
        torch.testing.assert_close(lowered(given), model(given), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_data_of_another_dtype_is_refused_by_packed_products_too_unless_the_model_casts_it(dtype: torch.dtype) -> None:
    class Casting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self[0].weight.dtype))

    x = torch.randn(2, 16)
    for kind in (nn.Sequential, Casting):
        model = frozen(kind(*(nn.Linear(16, 16) for _ in range(3))), x, include=["*"])
        lowered = forced(model, x)
        if kind is Casting:
            torch.testing.assert_close(lowered(x.to(dtype)), model(x.to(dtype)))
        else:
            with pytest.raises(nm.NMError, match=r"lowered for float32, and its inputs are \w*float\d+: cast them"):
                lowered(x.to(dtype))


@needs_kernels
@pytest.mark.parametrize("values", ["float32", "int8"])
def test_verify_says_of_packed_weights_that_they_have_no_zeros_to_look_at(values: str, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    lowered = forced(frozen(model, torch.randn(2, 16)), torch.randn(2, 16), options={"values": values})
    torch.save(lowered.state_dict(), tmp_path / "packed.pt")
    for target in (lowered.state_dict(), tmp_path / "packed.pt", {"part": lowered.state_dict()}):
        found = nm.verify(target)
        assert [len(weight.shape) for weight in found.weights] == [2, 2], "the stem and the head"
        assert found.packed == ("run._1_weight",)
        assert "run._1_weight: packed by nm.lower, which keeps no zeros to look at: verify the model" in str(found)
    only = {name: value for name, value in lowered.state_dict().items() if name.startswith("run._1_weight")}
    assert str(nm.verify(only)).startswith("0 of 0 weights are 2:4.")


# -- whole nets -------------------------------------------------------------------------------------------------------------

pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'").declare_missing_operators()
nets = pytest.importorskip("nets", reason="the zoo is an extra: pip install -e '.[zoo]'", exc_type=ImportError)


@functools.cache
def net_of(make: Any) -> tuple[nn.Module, Tensor, set[str], Any]:
    """The model, its input, the names of its sparse weights, and the model lowered."""
    model, x, sites = nets.frozen_net(make)
    return model, x, set(sites), forced(model, x)


@pytest.mark.ci(here=["resnet18"])
@needs_kernels
@pytest.mark.required
@pytest.mark.parametrize("make", nets.NETS, ids=lambda make: make.__name__)
def test_a_net_runs_on_packed_weights_and_its_numbers_stay(make: Any) -> None:
    model, x, sites, lowered = net_of(make)
    assert lowered.error < 1e-5
    assert {name.partition(" ")[0] for name, row in rows(lowered).items() if row.status == "sparse"} == sites
    assert len(packed_nodes(lowered)) == len(lowered.result.products)
    many = torch.cat([x, x, x])
    wanted = model(many)
    torch.testing.assert_close(lowered(many), wanted, rtol=1e-4, atol=1e-4)
    if x.ndim == 4:
        torch.testing.assert_close(lowered(many.contiguous(memory_format=torch.channels_last)), wanted, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_a_resnet_adds_and_activates_inside_its_products() -> None:
    lowered = net_of(nets.resnet18)[-1]
    targets = [str(node.target) for node in lowered.run.graph.nodes]
    assert sum("relu" in target for target in targets) == 1, "of the stem, which is dense"
    assert not any("add" in target for target in targets)


@pytest.mark.ci
@needs_kernels
@pytest.mark.parametrize("make", [nets.mobilenet_v2, nets.llama], ids=lambda make: make.__name__)
def test_a_net_in_bfloat16_stays_in_bfloat16(make: Any) -> None:
    model, x, sites, _ = net_of(make)
    lowered = forced(model, x, dtype=torch.bfloat16)
    assert lowered.error < 6e-2
    assert lowered(x).dtype == torch.bfloat16
    assert {row.kernel for row in rows(lowered).values() if row.status == "sparse"} == {"CPU packed 2:4 bfloat16"}
    assert {node.meta["val"].dtype for node in packed_nodes(lowered)} == {torch.bfloat16}
    assert len(packed_nodes(lowered)) >= len(sites)


@pytest.mark.ci
@needs_kernels
@pytest.mark.parametrize(("values", "bound"), [("bfloat16", 2e-2), ("int8", 1e-1)])
def test_rounded_values_take_less_memory_and_stay_within_what_the_report_allows(values: str, bound: float) -> None:
    model, x, _, full = net_of(nets.bert)
    lowered, before = forced(model, x, options={"values": values}), rows(full)
    assert 0 < lowered.error < bound
    for name, row in rows(lowered).items():
        if row.status == "sparse":
            assert row.kernel == f"CPU packed 2:4 {values}"
            assert row.bytes < before[name].bytes


# -- the module that comes back ---------------------------------------------------------------------------------------------


def convs() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(16, 8, 2, groups=2, dilation=2),
        nn.Conv1d(8, 8, 3, padding="same"), nn.Conv1d(8, 8, 2, padding="same"), nn.Conv1d(8, 4, 1),
    )  # fmt: skip
    x = torch.randn(2, 3, 30)
    return frozen(net, x), x


@needs_kernels
def test_convolutions_along_one_axis_are_packed_with_all_that_they_are_called_with() -> None:
    model, x = convs()
    lowered = forced(model, x)
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
    found = rows(lowered)
    assert {name for name, row in found.items() if row.status == "sparse"} == {"2.weight", "4.weight", "5.weight"}
    assert found["6.weight"].reason.startswith("conv1d with this padding or number of axes")


@needs_kernels
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_of_one_image_without_a_batch_are_packed_and_activate(axes: int) -> None:
    torch.manual_seed(0)
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    net = nn.Sequential(conv(4, 16, 3, padding=1), conv(16, 16, 3, padding="same"), nn.ReLU(), conv(16, 4, 1))
    x = torch.randn(4, *[6] * axes)
    model = frozen(net, x[None])
    free = {1: torch.export.Dim.AUTO}
    for lowered in (forced(model, x, dynamic_shapes=({},)), forced(model, x, dynamic_shapes=(free,))):
        assert {name for name, row in rows(lowered).items() if row.status == "sparse"} == {"1.weight"}
        assert not any(node.target is torch.ops.aten.relu.default for node in lowered.run.graph.nodes), "products activate"
        torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
        assert lowered(x).stride() == model(x).stride()
    other = torch.randn(4, 9, *[6] * (axes - 1))
    torch.testing.assert_close(lowered(other), model(other), rtol=1e-5, atol=1e-5)


VOLUMES: dict[str, dict[str, Any]] = {
    "3x1x1": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "stride": (2, 2, 3)},
    "1x1x3": {"kernel_size": (1, 1, 3), "stride": (2, 1, 1)},
    "1x3x1": {"kernel_size": (1, 3, 1), "padding": (0, 1, 0)},
    "1x3x3": {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "stride": (2, 1, 2)},
    "3x3x1": {"kernel_size": (3, 3, 1), "dilation": (1, 2, 1), "groups": 2},
    "1x1x1": {"kernel_size": 1, "stride": 2},
    "1x1x1 in a border": {"kernel_size": 1, "padding": 1},
    "3x3x3": {"kernel_size": 3, "padding": "same", "bias": False},
    "4x2x3": {"kernel_size": (4, 2, 3), "stride": (3, 1, 2), "padding": (2, 0, 1), "dilation": (1, 2, 1), "groups": 2},
}


@needs_kernels
@pytest.mark.parametrize("kernel", [pytest.param(each, marks=pytest.mark.ci(here=["1x3x3", "4x2x3"])) for each in VOLUMES])
def test_convolutions_over_three_axes_are_packed_as_images(kernel: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 8, 1), nn.Conv3d(8, 16, **VOLUMES[kernel]), nn.ReLU(), nn.Conv3d(16, 4, 1))
    x = torch.randn(2, 3, 7, 9, 8)
    free = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.AUTO)
    model = frozen(net, x)
    for lowered in (forced(model, x), forced(model, x, dynamic_shapes=(free,))):
        assert not any(node.target is torch.ops.aten.relu.default for node in lowered.run.graph.nodes), "products activate"
        for batch in (2, 1, 0):
            data = torch.randn(batch, 3, 7, 9, 8)
            torch.testing.assert_close(lowered(data), model(data), rtol=1e-5, atol=1e-5)
            assert lowered(data).is_contiguous()
    other = torch.randn(1, 3, 8, 7, 11)
    torch.testing.assert_close(lowered(other), model(other), rtol=1e-5, atol=1e-5)
    (row,) = [row for row in nm.report(lowered).rows if row.status == "sparse"]
    assert (row.name, row.kernel) == ("1.weight", "CPU packed 2:4")


@needs_kernels
@pytest.mark.parametrize("kernel", ["1x3x3", "3x3x3"])
def test_volumes_may_have_channels_innermost_and_stay_in_bfloat16(kernel: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 16, **VOLUMES[kernel]), nn.SiLU())
    last = torch.channels_last_3d
    x = torch.randn(2, 3, 7, 9, 8).contiguous(memory_format=last)
    model = frozen(net, x, include=["*"], exclude=["0.*"]).to(memory_format=last)
    lowered = forced(model, x)
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
    half = forced(model, x, dtype=torch.bfloat16)
    assert half(x).dtype == torch.bfloat16
    torch.testing.assert_close(half(x).float(), model(x), rtol=3e-2, atol=3e-2)


class Shortcut(nn.Module):
    """A weight that is called with two paddings, an addition of volumes and an activation of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)), nn.Conv3d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        wide = functional.conv3d(stem, self.conv.weight, None, padding=1)[..., 1:-1, 1:-1]
        return self.head(torch.relu(stem + self.conv(stem) + wide))


@needs_kernels
def test_volumes_are_added_as_they_lie_and_a_weight_may_be_padded_in_two_ways() -> None:
    model = frozen(Shortcut(), x := torch.randn(2, 3, 5, 6, 7))
    lowered = forced(model, x)
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(packed_nodes(lowered)) == 4, "one where the kernel is a view, and one for each of its frames"


class Mixing(nn.Module):
    """Weights on the left, of a batch of tokens, of one table and of a vector, with what is added and activated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.first, self.second, self.third, self.fourth = (nn.Parameter(torch.randn(32, 32) / 6) for _ in range(4))
        self.column, self.bias = nn.Parameter(torch.randn(32, 1)), nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)  # [B, 32, 8]
        y = torch.relu(self.first @ y) + torch.einsum("ij,bjd->bid", self.second, y)
        table = torch.addmm(self.column, self.third, y.flatten(0, 1).t().reshape(32, -1))
        vector = torch.addmv(self.bias, self.fourth, torch.mv(self.fourth, table.mean(1))) + self.fourth @ table[:, 0]
        return self.head(y.view(-1, 8)) + vector[:4]


@needs_kernels
def test_weights_on_the_left_of_tables_and_vectors_are_packed() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 32, 8)
    model = frozen(Mixing(), x, include=["first", "second", "third", "fourth"])
    lowered, half = forced(model, x), forced(model, x, dtype=torch.bfloat16)
    assert {row.name for row in nm.report(lowered).rows if row.status == "sparse"} >= {"first", "second", "third", "fourth"}
    for each in (lowered, half):  # eight tokens, one, or as many as the batch says
        assert [node.target for node in packed_nodes(each)] == [LINEAR] * 6
    for batch in (3, 1, 5):
        data = torch.randn(batch, 32, 8)
        torch.testing.assert_close(lowered(data), model(data), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(half(data).float(), model(data), rtol=5e-2, atol=5e-2)


@needs_kernels
def test_many_tokens_behind_a_weight_on_the_left_are_pixels_and_activated_by_the_product(stages: Any, golden: Golden) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.gate = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))
            self.own, self.head = nn.Linear(16, 16), nn.Linear(32, 4)  # the first one is turned by the user's own code

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.gate @ torch.relu(self.mix @ x) + x)
            return self.head(self.own(x.mT).mT)

    model = frozen(Tokens(), x := torch.randn(2, 16, 32), include=["mix", "gate", "own.weight"])
    lowered = forced(model, x)
    golden("turned_linears_tokens", after(stages, "turned_linears"))
    assert [(node.target, node.args[-1]) for node in packed_nodes(lowered)] == [
        (CONV2D, "relu"),
        (CONV2D, "relu"),
        (CONV2D, ""),
    ]
    data = torch.randn(3, 16, 32)
    torch.testing.assert_close(lowered(data), model(data), rtol=1e-5, atol=1e-5)
    assert lowered(data).is_contiguous()


@needs_kernels
def test_a_weight_on_the_left_that_stays_dense_multiplies_its_data_as_they_lie(stages: Any, golden: Golden) -> None:
    class Left(nn.Module):
        """Two of them, and a linear of turned data that is one in the user's own code."""

        def __init__(self) -> None:
            super().__init__()
            self.mix, self.gate = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(16, 32))
            self.tokens, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.gate @ torch.relu(self.mix @ x)
            return self.head((x + self.tokens(x.mT).mT).mT)

    model = frozen(Left(), x := torch.randn(3, 16, 24), include=["mix", "gate"])
    dense = nm.lower(model, (x,), backend="dense")
    products = [node for node in dense.run.graph.nodes if node.target is torch.ops.aten.matmul.default]
    assert [node.args[0].target for node in products] == ["mix", "gate"]
    few = nm.lower(frozen(Left(), x[..., :8], include=["mix", "gate"]), (x[..., :8],), backend="dense")
    assert torch.ops.aten.matmul.default not in [node.target for node in few.run.graph.nodes], "torch is slow there"
    nm.lower(model, (x,), backend="cpu", force=["mix"])
    golden("left_products", after(stages, "left_products"))
    for batch in (3, 1, 5):
        data = torch.randn(batch, 16, 24)
        torch.testing.assert_close(dense(data), model(data), rtol=1e-5, atol=1e-5)
        assert dense(data).stride() == model(data).stride()


@needs_kernels
def test_as_many_tokens_behind_a_weight_on_the_left_as_a_call_has_stay_tokens_of_a_linear() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.mix @ x)

    model = frozen(Table(), x := torch.randn(16, 64), include=["mix"])
    free = {"x": {1: torch.export.Dim.AUTO}}
    assert [node.target for node in packed_nodes(forced(model, x))] == [CONV2D]
    lowered = forced(model, x, dynamic_shapes=free)
    assert [node.target for node in packed_nodes(lowered)] == [LINEAR], "few of them are faster so"
    for tokens in (1, 5, 64, 90):
        data = torch.randn(16, tokens)
        torch.testing.assert_close(lowered(data), model(data), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_convolutions_over_one_axis_add_and_activate_while_they_write() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(functional.gelu(self.first(x))) + x)

    model = frozen(Residual(), x := torch.randn(2, 8, 11), include=["*"])
    lowered = forced(model, x)
    assert [(node.args[5] is not None, node.args[-1]) for node in packed_nodes(lowered)] == [(False, "gelu"), (True, "relu")]
    for batch in (1, 3):
        data = torch.randn(batch, 8, 11)
        torch.testing.assert_close(lowered(data), model(data), rtol=1e-5, atol=1e-5)


class Bottleneck(nn.Module):
    """What is padded and cut into frames is added behind one that is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return torch.relu(self.other(y) + y)


@needs_kernels
def test_volumes_that_are_padded_and_then_added_take_any_batch() -> None:
    model = frozen(Bottleneck(), x := torch.randn(3, 8, 4, 5, 6), include=["*"])
    lowered = forced(model, x)
    for batch in (3, 1, 4):
        data = torch.randn(batch, 8, 4, 5, 6)
        torch.testing.assert_close(lowered(data), model(data), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_state_dict_holds_the_packed_weights_and_comes_back_and_no_dense_one_is_kept(tmp_path: Path) -> None:
    model, x = convs()
    lowered = forced(model, x)
    names = set(lowered.state_dict())
    assert {"run.2_weight_values", "run.2_weight_codes"} <= {name.replace("run._", "run.") for name in names}, names
    assert "run.2.weight" not in names
    wanted = lowered(x)
    torch.save(lowered.state_dict(), tmp_path / "state.pt")
    again = forced(model, x)
    with torch.no_grad():
        for value in again.state_dict().values():
            value.zero_()
    assert not torch.equal(again(x), wanted)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(again(x), wanted)


@pytest.mark.ci(here=["dtype0"])
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_is_lowered_with_the_cast_that_the_error_names(dtype: torch.dtype) -> None:
    model = ConvNet().eval()
    x = example(model, batch=16).to(dtype)
    model = frozen(model, example(model)).to(dtype)
    if dtype != torch.bfloat16:
        with pytest.raises(
            nm.NMError, match=r"float\d\d, and the CPU kernels take float32 and bfloat16: say dtype=torch\.float32"
        ):
            forced(model, x)
        assert "say dtype=torch.float32" in str(nm.report(nm.lower(model, (x,))))  # backend="auto"
    lowered = forced(model, x, dtype=torch.float32)
    assert lowered(x).dtype == torch.float32
    torch.testing.assert_close(lowered(x), model.float()(x.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.ci(here=["int8-dtype1"])
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [None, "bfloat16", "int8"])
def test_what_changes_no_dtype_leaves_packed_weights_as_they_lie(dtype: torch.dtype, values: str | None) -> None:
    model = ConvNet().eval()
    x = example(model)
    model, x = frozen(model, x).to(dtype), x.to(dtype)
    lowered = nm.lower(model, (x,), backend="cpu", options={"choose": False, **({"values": values} if values else {})})
    before = lowered(x)
    for same in ({"memory_format": torch.channels_last}, {"dtype": dtype}, {"device": "cpu"}):
        twin = copy.deepcopy(lowered).to(**same)
        torch.testing.assert_close(twin(x), before)
        torch.testing.assert_close(twin(x.to(memory_format=torch.channels_last)), before)
    with pytest.raises(nm.NMError, match=f"packed for {str(dtype).removeprefix('torch.')} on cpu: for float64 on cpu"):
        lowered.double()
    torch.testing.assert_close(lowered(x), before)


@pytest.mark.ci(here=["<lambda>0"])
@needs_kernels
@pytest.mark.parametrize("turn", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_another_dtype_is_refused_with_the_way_out_and_nothing_has_changed(turn: Any) -> None:
    model = Attention()
    x = example(model)
    lowered = forced(frozen(model, x), x)
    before = lowered(x)
    with pytest.raises(
        nm.NMError, match=r"this Attention is packed for float32 on cpu: for .*, lower the model anew, with dtype="
    ):
        turn(nn.Sequential(lowered))
    assert torch.equal(lowered.float().to("cpu")(x), before)


GRADIENTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "backward": lambda model, x: model(x.clone().requires_grad_()).sum().backward(),
    "beside it": lambda model, x: [(y := x.clone().requires_grad_()), (model(y) + y).sum().backward()],
    "torch.func": lambda model, x: torch.func.grad(lambda y: model(y).sum())(x),
    "forward mode": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "compiled": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x.clone().requires_grad_()),
}


@pytest.mark.ci(here=["backward", "beside it"])
@needs_kernels
@pytest.mark.parametrize("way", GRADIENTS)
def test_a_gradient_that_packed_products_would_drop_is_an_error_that_says_so(way: str) -> None:
    x = torch.randn(4, 16)
    model = frozen(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), x)
    lowered = forced(model, x)
    with pytest.raises(
        Exception, match="kernels that have no gradient, and one is asked for: call it under torch.no_grad"
    ) as e:
        GRADIENTS[way](lowered, x)
    assert isinstance(e.value, nm.NMError) or way == "compiled"
    wants = x.clone().requires_grad_()
    torch.testing.assert_close(lowered(wants), model(wants), msg="who asks for none gets none")
    with torch.no_grad():
        assert not lowered(wants).requires_grad
    dense = nm.lower(model, (x,), backend="dense")
    dense(wants).sum().backward()
    theirs = torch.autograd.grad(model(wants).sum(), wants)[0]
    torch.testing.assert_close(wants.grad, theirs)


@needs_kernels
def test_a_part_that_was_lowered_before_is_lowered_with_the_model_around_it() -> None:
    x = torch.randn(4, 32)
    inner = frozen(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), x)
    outer = frozen(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), x)
    wanted = outer(inner(x))
    lowered = forced(nn.Sequential(forced(inner, x), outer), x)
    torch.testing.assert_close(lowered(x), wanted, rtol=1e-5, atol=1e-5)


TRAINED: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "captured": lambda model, x: nm.compile(model, (x,), include="*", method=nm.SRSTE()),
    "live": lambda model, x: nm.compile(model, include="*", method=nm.SRSTE(), then="eager"),
    "by name": lambda model, x: torch.compile(model, backend="nm_compiler", options={"include": ["*"], "then": "eager"}),
}


@needs_kernels
@pytest.mark.parametrize("way", TRAINED)
def test_a_model_trains_behind_a_packed_part_and_not_through_it(way: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 32)
    inner = frozen(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), x)
    packed = forced(inner, x)
    head, body = nn.Linear(32, 32), nn.Linear(32, 32)
    TRAINED[way](nn.Sequential(packed, head), x)(x).sum().backward()
    assert head.weight.grad is not None
    with pytest.raises(nm.NMError, match="kernels that have no gradient, and one is asked for"):
        TRAINED[way](nn.Sequential(body, packed, nn.Linear(32, 32)), x)(x).sum().backward()
    assert body.weight.grad is None


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_packed_in_8_bits_whatever_dtype_is_the_default(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32)
    model = frozen(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        lowered = nm.lower(model, (x,), backend="cpu", options={"choose": False, "values": "int8"})
    finally:
        torch.set_default_dtype(before)
    assert lowered(x).dtype == torch.float32


@needs_kernels
def test_packed_2_4_weights_in_float32_take_at_most_0_54_of_dense() -> None:
    net = nn.Sequential(
        nn.Linear(8, 256),
        nn.Linear(256, 256),
        nn.Unflatten(1, (64, 2, 2)),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Flatten(),
        nn.Linear(256, 8),
    )
    x = torch.randn(3, 8)
    model = frozen(net, x)
    lowered = forced(model, x)
    dense = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    found = rows(lowered)
    for name in ("1.weight", "3.weight"):
        assert found[name].bytes <= 0.54 * dense[name]
    held = sum(value.nbytes for value in lowered.state_dict().values())
    saved = sum(dense[name] - found[name].bytes for name in ("1.weight", "3.weight"))
    assert held == sum(dense.values()) - saved, "nothing beside them"


@needs_kernels
def test_a_weight_that_two_products_share_is_packed_once() -> None:
    model, x = Net(lambda net, h: net.fc(torch.tanh(net.fc(h)))), torch.randn(4, 8)
    model = frozen(model, x)
    lowered = forced(model, x)
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
    held = [value.data_ptr() for name, value in lowered.state_dict().items() if name.endswith("values")]
    assert len(set(held)) == 1
    assert [name for name, row in rows(lowered).items() if row.status == "sparse"] == ["fc.weight", "fc.weight [1]"]


@needs_kernels
def test_a_lowered_model_compiles_whole_and_can_be_exported() -> None:
    model, x = ConvNet(), example(ConvNet())
    model = frozen(model, x)
    lowered = forced(model, x)
    with torch.no_grad():
        compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), lowered(x))
        program = torch.export.export(lowered, (x,))
        torch.testing.assert_close(program.module()(x), lowered(x))
    assert any("packed_conv2d" in str(node.target) for node in program.graph.nodes)


# -- what is chosen, and what is said ---------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, ...]]:
    """Products with 32 outputs are twice as fast sparse, others half as fast: no clock is read. Gives what was measured."""
    found: list[tuple[int, ...]] = []

    def fake(weight: Tensor, packed: Any, x: Tensor, bias: Any, conv: Any, *, inductor: bool) -> Timing:
        found.append((*weight.shape, *x.shape))
        return Timing(2e-3, 1e-3) if weight.shape[0] == 32 else Timing(1e-3, 2e-3)

    monkeypatch.setattr(cpu, "timed", fake)
    monkeypatch.setattr(cpu, "compared", lambda *graphs, inductor: Whole({"eager": 2e-3, "packed": 1e-3}))
    monkeypatch.setenv("NM_COMPILER_CACHE", str(tmp_path))
    return found


def choices() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 1), nn.Flatten(),
        nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 24), nn.Linear(24, 4),
    )  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    return frozen(net, x), x


@needs_kernels
def test_each_distinct_product_is_measured_once_and_the_faster_way_runs(measured: Any, tmp_path: Path) -> None:
    model, x = choices()
    lowered = nm.lower(model, (x,), backend="cpu")
    assert sorted(measured) == [
        (16, 32, 1, 1, 3, 32, 2, 2), (24, 32, 3, 32), (32, 32, 3, 3, 3, 32, 4, 4), (32, 32, 3, 3, 3, 32, 6, 6), (32, 32, 3, 32), (32, 64, 3, 64),
    ]  # fmt: skip
    found = rows(lowered)
    fast, slow = found["7.weight"], found["9.weight"]
    assert (fast.status, fast.kernel, fast.reason) == ("sparse", "CPU packed 2:4", "CPU packed 2:4")
    assert (fast.dense_ms, fast.sparse_ms, fast.speedup) == (2.0, 1.0, 2.0)
    assert fast.bytes == 32 * 32 * 4 * 17 // 32
    assert (slow.status, slow.kernel, slow.eligible) == ("dense", None, True)
    assert slow.reason == "measured 0.50x of dense at 3 tokens"
    assert slow.hint == "fewer kept weights (1:4, 1:8), a larger layer, or force=[...]"
    assert slow.bytes == 24 * 32 * 4
    assert (slow.dense_ms, slow.sparse_ms) == (1.0, 2.0)
    assert found["4.weight"].reason == "measured 0.50x of dense at inputs of [3, 32, 2, 2]"
    assert found["0.weight"].reason == "3 input channels, groups of 2:4 need a multiple of 4"
    assert "CPU kernels for " in str(nm.report(lowered))
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
    before = len(measured)
    again = nm.lower(model, (x,), backend="auto")
    assert again.backend == "cpu"
    assert rows(again)["7.weight"].speedup == 2.0
    assert len(measured) == before, "known from the file"
    known = json.loads((tmp_path / "choices.json").read_text())
    assert len(known) == before
    named = ("isa=", "kernels=", "threads", "torch=", torch.backends.cpu.get_cpu_capability())
    assert all(part in key for key in known for part in named)
    nm.lower(
        model, (x.contiguous(memory_format=torch.channels_last),), backend="cpu", options={"cache": tmp_path / "other.json"}
    )
    assert len(measured) == 2 * before


@needs_kernels
def test_forced_weights_are_not_measured_and_without_choose_none_is(measured: Any) -> None:
    model, x = choices()
    lowered = nm.lower(model, (x,), backend="cpu", force=["4.*", "9.weight"])
    assert not [each for each in measured if each[0] in (16, 24)]
    assert {name for name, row in rows(lowered).items() if row.status == "dense"} == {"0.weight", "10.weight"}
    assert rows(lowered)["9.weight"].dense_ms is None
    del measured[:]
    lowered = nm.lower(model, (x,), backend="cpu", options={"choose": False})
    assert not measured
    assert rows(lowered)["4.weight"].status == "sparse"


@needs_kernels
def test_a_graph_whose_products_win_and_which_loses_as_a_whole_stays_dense(measured: Any, monkeypatch: Any) -> None:
    model, x = choices()
    times = {"eager": 1.0e-3, "packed": 1.25e-3, "inductor": 0.9e-3, "packed, inductor": 0.6e-3}
    asked: list[bool] = []

    def fake(dense: nn.Module, packed: dict[str, nn.Module], flat: Any, *, inductor: bool) -> Whole:
        asked.append(inductor)
        assert list(packed) == ["packed", "packed, channels last"]
        for each in packed.values():
            torch.testing.assert_close(dense(*flat), each(*flat), rtol=1e-4, atol=1e-5)
        return Whole(times if inductor else {way: times[way] for way in ("eager", "packed")})

    monkeypatch.setattr(cpu, "compared", fake)
    lowered = nm.lower(model, (x,), backend="cpu")
    row = rows(lowered)["7.weight"]
    assert (row.status, row.reason) == ("dense", "measured 0.80x of dense in the whole graph")
    assert rows(lowered)["9.weight"].reason == "measured 0.50x of dense at 3 tokens"
    assert not [node for node in lowered.run.graph.nodes if "packed" in str(node.target)]
    assert "Whole graph: eager 1 ms; packed 1.25 ms. The best packed one is 0.80x as fast as eager." in str(nm.report(lowered))
    torch.testing.assert_close(lowered(x), model(x))
    lowered = nm.lower(model, (x,), backend="cpu", options={"against": "inductor"})
    assert rows(lowered)["7.weight"].status == "sparse"
    assert asked == [False, True]
    nm.lower(model, (x,), backend="cpu", force=["9.weight"])
    nm.lower(model, (x,), backend="cpu", options={"choose": False})
    assert len(asked) == 2, "what the user forces is not undone"


@pytest.mark.ci
@needs_kernels
def test_whole_graphs_are_timed_in_every_way() -> None:
    model, _ = choices()
    flat = (torch.randn(3, 3, 8, 8),)
    lowered = nm.lower(model, flat, backend="cpu", force=["*"])
    assert list(compared(lowered.run, {"packed": lowered.run}, flat, inductor=False).seconds) == ["eager", "packed"]
    every = compared(lowered.run, {"packed": lowered.run}, flat, inductor=True)
    assert list(every.seconds) == ["eager", "packed", "inductor", "packed, inductor"]
    assert min(every.seconds.values()) > 0


@needs_kernels
def test_example_inputs_that_a_model_writes_to_are_as_before_and_every_timed_call_finds_them_so() -> None:
    x, cache, length = torch.randn(3, 8), torch.zeros(3, 4, 16), torch.tensor(3)
    copies = [value.clone() for value in (x, cache, length)]
    model = nm.freeze(nm.compile(Stepping(), (x, cache, length), method=nm.Magnitude())).eval()
    lowered = nm.lower(model, (x, cache, length), backend="cpu", force=["*"])
    compared(lowered.run, {"packed": lowered.run}, (x, cache, length), inductor=False)  # past four rows, the second would fail
    assert (int(length), int(cache.count_nonzero())) == (3, 0)
    torch.testing.assert_close(lowered(x, cache, length), model(*copies))
    assert int(length) == 4


@needs_kernels
def test_weights_sparser_than_they_are_packed_for_are_named_with_their_pattern() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(4, 32)
    patterns = {"0.weight": "2:8", "2.weight": "1:4", "4.weight": "2:4"}
    with torch.no_grad():
        for name, pattern in patterns.items():
            model.get_parameter(name).copy_(masked(model.get_parameter(name), pattern=pattern))

    def lines(pattern: Any) -> str:
        return str(nm.report(nm.lower(model, x, backend="cpu", pattern=pattern, force=["*"])))

    assert "Sparser than pattern= says: 2.weight is 1:4. Packed" in lines({**patterns, "2.weight": "2:4"})
    assert "Sparser than" not in lines(patterns)
    with torch.no_grad():
        model[4].weight.zero_()
        model[0].weight.copy_(model[2].weight)
    assert "Sparser than pattern= says: 0.weight, 2.weight are 1:4. Packed" in lines("2:4")


def test_options_that_there_are_not_are_refused() -> None:
    model, x = choices()
    with pytest.raises(nm.NMError, match="'values': 'int4'.*choose one of float32, bfloat16, int8"):
        forced(model, x, options={"values": "int4"})
    with pytest.raises(nm.NMError, match="has no option 'tokens'; it has values, choose, cache, against"):
        forced(model, x, options={"tokens": 1})
    with pytest.raises(nm.NMError, match="'against': 'jit'.*choose eager or inductor"):
        forced(model, x, options={"against": "jit"})
    with pytest.raises(nm.NMError, match="float16, and the CPU kernels take float32 and bfloat16"):
        forced(model, x, dtype=torch.float16)


@needs_kernels
def test_all_ways_that_are_measured_compute_the_same() -> None:
    torch.manual_seed(0)
    at, bias = Pattern(2, 4), torch.randn(32)
    for shape, size, conv in (
        ((32, 16), (2, 5, 16), None),
        ((32, 8, 3, 3), (2, 16, 7, 6), Conv((2, 1), (1, 1), (1, 1), 2, False)),
        ((32, 16, 3), (2, 16, 9), Conv((1, 2), (0, 1), (1, 1), 1, True)),
        ((32, 8, 3, 1, 1), (2, 16, 7, 6, 5), Volume((3, 1, 1), (2, 1, 1), (1, 0, 0), (1, 1, 1), 2)),
        ((32, 8, 3, 3, 2), (2, 16, 7, 6, 5), Volume((3, 3, 2), (2, 1, 2), (1, 0, 1), (1, 2, 1), 2)),
    ):
        weight, x = masked(torch.randn(shape), pattern=at, axis=1), torch.randn(size)
        parts = conv.parts(weight) if isinstance(conv, Volume) else [weight]
        packed = [pack(part, at, conv_groups=1 if conv is None else conv.groups) for part in parts]
        assert all(torch.equal(unpack(each), part) for each, part in zip(packed, parts, strict=True))
        given = (weight, x, bias) if conv is None else (weight, x, bias, conv)
        eager, prepacked = (_linear_ways, _linear_prepacked) if conv is None else (_conv_ways, _conv_prepacked)
        wanted = _sparse(packed, x, bias, conv)()
        found = [*eager(*given), *prepacked(*given)]
        assert len(found) == 3
        for way in found:
            torch.testing.assert_close(way().reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)
        assert timed(weight, packed, x, bias, conv, inductor=True).dense_s > 0


# -- without kernels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded() -> Iterator[None]:
    """Nobody remembers which kernels there are, neither now nor afterwards."""
    load.cache_clear()
    yield
    load.cache_clear()


def no_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(library_module, "__file__", str(folder / "library.py"))


def a_log(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    no_library(monkeypatch, folder)
    (folder / "_kernels.log").write_text("error: no stdint.h")


def no_library_at_all(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    no_library(monkeypatch, folder)
    (folder / "_kernels.so").write_text("not a library")


WITHOUT: dict[str, tuple[Any, str]] = {
    "not built": (no_library, "the CPU kernels were not built: pip install nm_compiler, with a C compiler at hand"),
    "not compiled": (a_log, "the CPU kernels were not built: the compiler's words are in "),
    "another file": (no_library_at_all, "the CPU kernels cannot be loaded ("),
    "another version": (lambda patch, _: patch.setattr(library_module, "VERSION", 0), "the CPU kernels were built from another version"),
    "other fields": (lambda patch, _: patch.setattr(library_module, "BYTES", 8), "the CPU kernels were built from another version"),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("case", list(WITHOUT))
def test_without_kernels_a_model_stays_dense_and_the_report_says_why(
    case: str, unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change, words = WITHOUT[case]
    model = Grouped()
    x = example(model)
    model = frozen(model, x)
    change(monkeypatch, tmp_path)
    lowered = nm.lower(model, (x,), backend="auto")
    assert lowered.backend == "dense"
    assert torch.equal(lowered(x), model(x))
    assert f"Not used, cpu: {words}" in str(nm.report(lowered))
    assert rows(lowered)["grouped.weight"].reason == "no CPU kernels here"
    with pytest.raises(nm.NMError, match=r"backend='cpu' cannot be used here: the CPU kernels"):
        nm.lower(model, (x,), backend="cpu")
    packed = pack(masked(torch.randn(4, 8), pattern="2:4"), Pattern(2, 4))
    with pytest.raises(nm.NMError, match="nm::packed ops cannot run here: "):
        LINEAR(torch.randn(2, 8), packed.values, packed.codes, None, None, None, [2, 4], 4, "")


OFF = """
import torch, nm_compiler as nm
from torch import nn
net = nn.Sequential(nn.Linear(8, 4)).eval()
with torch.no_grad():
    net[0].weight[:, ::2] = 0
print(nm.report(nm.lower(net, (torch.randn(2, 8),))))
"""


@pytest.mark.ci
def test_an_environment_variable_switches_the_kernels_off() -> None:
    environment = {**os.environ, "NM_COMPILER_NATIVE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFF], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert not done.returncode, done.stderr[-2000:]
    assert "Not used, cpu: switched off by NM_COMPILER_NATIVE=0" in done.stdout


@pytest.mark.parametrize(("has", "machine", "found"), [
    ((0, 1, 2), "x86_64", "avx512"), ((0, 1), "x86_64", "avx2"), ((0,), "aarch64", "portable"),
    ((0,), "AMD64", "the processor has no AVX2: dense kernels are faster there"),
])  # fmt: skip
def test_the_widest_vectors_that_the_processor_has_are_taken(
    has: tuple[int, ...], machine: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = SimpleNamespace(nm_isa_name=lambda number: b"" if number in has else None, nm_halves=lambda number: 0)
    monkeypatch.setattr(library_module.platform, "machine", lambda: machine)
    chosen = library_module._chosen(handle, None)
    assert (chosen.isa if isinstance(chosen, Library) else chosen) == found
    if 2 not in has:
        assert library_module._chosen(handle, "avx512") == "the processor has no avx512"
