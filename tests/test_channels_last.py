# mypy: disable-error-code="arg-type,assignment,attr-defined,index,no-any-return,operator,union-attr"
"""Images with their channels innermost: the same numbers and strides of results, and graphs that are left as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Grouped, example
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.capture.export import capture_mode
from nm_compiler.graph import show_graph
from nm_compiler.passes.channels_last import channels_last
from nm_compiler.runtime.backends import cpu
from nm_compiler.runtime.native.library import load
from nm_compiler.runtime.native.whole import Whole

LAST = torch.channels_last
needs_kernels = pytest.mark.skipif(isinstance(load(), str), reason=f"no CPU kernels here: {load()}")


class Depthwise(nn.Module):
    """Two results: images, and one row a picture, by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 16, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(16 * 4 * 4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = functional.relu6(self.point(functional.relu6(self.depth(functional.relu6(self.stem(x))))))
        return y, self.head(y.view(-1, 16 * 4 * 4))


def graph_of(model: nn.Module, x: Tensor) -> Any:
    return capture_mode(model.eval(), (x,), {}, training=False)[0]


def images(batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, 10, 10)


def turned(gm: Any) -> list[Any]:
    return [node for node in gm.graph.nodes if node.kwargs.get("memory_format") is LAST]


def test_all_behind_the_first_convolution_follows_it_and_results_lie_as_before(golden: Callable[[str, str], None]) -> None:
    gm = graph_of(Depthwise(), images())
    made = channels_last(gm)
    assert made is not gm
    assert "channels_last" not in show_graph(gm), "the graph that was given is as it was"
    golden("channels_last_depthwise", show_graph(made))
    for batch in (1, 2, 5):
        x = images(batch)
        for mine, other in zip(made(x), gm(x), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
            assert mine.stride() == other.stride()
        x = x.contiguous(memory_format=LAST)
        torch.testing.assert_close(made(x)[1], gm(images(batch).copy_(x))[1], rtol=1e-5, atol=1e-5)


@needs_kernels
def test_packed_convolutions_follow_and_compute_the_same(golden: Callable[[str, str], None]) -> None:
    x = example(Grouped())
    model = nm.freeze(nm.compile(Grouped(), (x,), method=nm.Magnitude())).eval()
    lowered = nm.lower(model, (x,), backend="cpu", force=["*"])
    made = channels_last(lowered.run)
    assert len(turned(made)) == 1
    torch.testing.assert_close(made(x), lowered.run(x), rtol=1e-5, atol=1e-5)
    assert {name for name, _ in made.named_buffers()} == {name for name, _ in lowered.run.named_buffers()}
    assert all(mine.data_ptr() == other.data_ptr() for mine, other in zip(made.buffers(), lowered.run.buffers(), strict=True))


def in_place(model: Any, x: Tensor) -> Tensor:
    return functional.relu(model.second(functional.relu(model.first(x), inplace=True)), inplace=True)


def skip(model: Any, x: Tensor) -> Tensor:
    y = model.first(x)
    return model.second(y) + y


FOLLOWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "activations in place": in_place,
    "an addition": skip,
    "a gate of one pixel": lambda m, x: m.first(x) * torch.sigmoid(m.second(functional.adaptive_avg_pool2d(m.first(x), 1))),
    "a pooling": lambda m, x: functional.max_pool2d(m.first(x), 2),
    "tokens": lambda m, x: m.first(x).flatten(2).transpose(1, 2),
    "halves": lambda m, x: torch.cat(m.first(x).chunk(2, 1)[::-1], 1),
    "a view that is a result": lambda m, x: (m.first(x), m.first(x).view(-1, 10)),
    "rows of pixels": lambda m, x: torch.relu(m.first(x).view(-1, 4, 100)),
    "its input, which is a result": lambda m, x: (m.first(x).sum(), x.add_(1)),
}
STAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "no convolution": lambda m, x: x * 2,
    "a view that is written to": lambda m, x: m.first(x).view(-1, 10).mul_(2),
    "strides that are read": lambda m, x: m.first(x).as_strided((4, 4), (10, 1)),
    "a body": lambda m, x: torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (m.first(x),)),
    "a signal": lambda m, x: functional.conv1d(x.flatten(2), m.first.weight[:, :, 0, :1]),
}  # fmt: skip


class Two(nn.Module):
    """Two convolutions of equal sizes, and what is done with them."""

    def __init__(self, does: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.does = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), does

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


@pytest.mark.parametrize("case", list(FOLLOWS))
def test_whatever_stands_behind_a_convolution_computes_the_same(case: str) -> None:
    gm = graph_of(Two(FOLLOWS[case]), images(channels=4))
    made = channels_last(gm)
    assert turned(made)
    for batch in (1, 3):
        x = images(batch, 4)
        mine, other = made(x.clone()), gm(x.clone())
        for one, two in zip(mine, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
            assert one.stride() == two.stride() or not (two.ndim == 4 or two.is_contiguous())


@pytest.mark.parametrize("case", list(STAYS))
def test_a_graph_that_knows_where_its_numbers_lie_is_returned_as_it_was(case: str) -> None:
    gm = graph_of(Two(STAYS[case]), images(channels=4))
    assert channels_last(gm) is gm


def test_images_that_lie_so_already_are_left_alone() -> None:
    gm = graph_of(Two(skip), images(channels=4).contiguous(memory_format=LAST))
    assert channels_last(gm) is gm


@needs_kernels
@pytest.mark.parametrize("best", ["packed", "packed, channels last"])
def test_the_layout_that_was_measured_to_be_faster_runs_and_the_report_says_so(
    best: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = Depthwise(), images()
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    seconds = {"eager": 4e-3, "packed": 2e-3, "packed, channels last": 2e-3, best: 1e-3}
    monkeypatch.setattr(cpu, "timed", lambda *_, inductor: cpu.Timing(2e-3, 1e-3))
    monkeypatch.setattr(cpu, "compared", lambda *_, inductor: Whole(seconds, best))
    lowered = nm.lower(model, (x,), backend="cpu", options={"cache": tmp_path / "choices.json"})
    assert bool(turned(lowered.run)) == (best != "packed")
    assert f"{best} 1 ms" in str(nm.report(lowered))
    for mine, other in zip(lowered(x), model(x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert mine.stride() == other.stride()
