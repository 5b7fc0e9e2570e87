"""nm.show_axes: a text to read, a picture to look at, and ops without a rule said aloud."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from models import Attention, ConvNet, example
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.axes.network import network
from nm_compiler.axes.result import Axes

SVG = "{http://www.w3.org/2000/svg}"


class Block(nn.Module):
    """A transformer block with two heads, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.qkv, self.proj = nn.Embedding(12, 8), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.fc1, self.fc2, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(torch.relu(self.fc1(self.norm2(x))))
        y: Tensor = self.head(x)
        return y


class Unruled(nn.Module):
    """An op that has no rule, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.renorm(self.up(x), 2, 1, 1.0))
        y: Tensor = self.down(torch.renorm(torch.relu(x), 2, 1, 1.0))
        return y


TOKENS = torch.arange(12).view(2, 6)


def axes_of(kind: type[nn.Module]) -> Axes:
    model = kind()
    return nm.show_axes(model, (TOKENS if kind is Block else torch.randn(2, 8) if kind is Unruled else example(model),))


@pytest.mark.parametrize("kind", [Block, ConvNet])
def test_the_text_names_every_class_with_what_it_moves(kind: type[nn.Module], golden: Callable[[str, str], None]) -> None:
    golden(f"axes_{kind.__name__.lower()}", str(axes_of(kind)))


def test_nothing_is_changed_by_looking() -> None:
    model = ConvNet().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nm.show_axes(model, (example(model),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_weights_without_values_will_do() -> None:
    with torch.device("meta"):
        model, x = ConvNet(), torch.empty(2, 3, 8, 8)
    assert str(nm.show_axes(model, (x,))) == str(axes_of(ConvNet))


def test_a_class_is_found_by_its_name_and_by_that_of_any_axis_in_it() -> None:
    axes = axes_of(ConvNet)
    each = axes["norm1.running_var[0]"]
    assert each is axes["conv2.weight[1]"]
    assert each.free
    assert axes.is_free("conv1.weight", 1)
    assert not axes.is_free("conv1.weight", 2)
    with pytest.raises(KeyError):
        axes["conv9.weight[0]"]


@pytest.mark.ci(here=["Attention"])
@pytest.mark.parametrize("kind", [Block, ConvNet, Attention, Unruled])
def test_the_picture_is_valid_and_has_every_free_class(kind: type[nn.Module], tmp_path: Path) -> None:
    axes = axes_of(kind)
    axes.draw(str(tmp_path / "axes.svg"))
    root = ElementTree.parse(tmp_path / "axes.svg").getroot()
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert all(any(title.startswith(f"{each.name}: free") for title in titles) for each in axes.free)
    width, height = (float(root.attrib[key]) for key in ("width", "height"))
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]
    assert all(0 < x < width and 0 < y < height for x, y in circles)
    lines = [(p.attrib["d"], p.attrib["stroke"]) for p in root.iter(f"{SVG}path")]
    assert len(set(lines)) == len(lines)
    assert len({colour for _, colour in lines if colour != "#b4b4b4"}) == len(axes.free)


def test_an_op_without_a_rule_is_logged_once_and_named_in_the_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nm_compiler"):
        axes = axes_of(Unruled)
    assert [r.message for r in caplog.records if "no rule" in r.message] == ["no rule for renorm: it pinned 2 axes"]
    assert axes.unknown == {"renorm": 2}
    assert str(axes).endswith("  no rule for renorm: it pinned 2 axes")
    assert not axes.free
    assert axes["up.weight[0]"].pinned == "renorm has no rule"


def test_the_axes_are_a_networkx_graph_in_the_direction_of_the_data() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    graph = network(nm.show_axes(model, (torch.randn(2, 8),)))
    assert nx.shortest_path(graph, "0.weight", "2.weight") == ["0.weight", ("class", "0.weight[0]"), "2.weight"]
    assert graph.nodes[("class", "0.weight[0]")] == {"kind": "class", "size": 16, "pinned": None}


class Telling(nn.Module):
    """Returns its hidden layer beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.first(x))
        return self.second(hidden), hidden


@pytest.mark.parametrize(
    ("outputs", "free"), [(None, False), (0, True), ([0], True), (1, False), ([0, 1], False), (lambda given: given[0], True)]
)
def test_an_output_that_need_not_keep_its_order_leaves_its_axis_free(outputs: Any, free: bool) -> None:
    axes = nm.show_axes(Telling(), (torch.randn(2, 8),), outputs=outputs)
    assert axes.is_free("first.weight", 0) is free
