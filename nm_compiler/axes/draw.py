"""A picture of coupled axes: weights in columns from input to output, a coloured curve for every free class they share.

    (weight) --outputs--> [class] --inputs--> (weight)

A class is drawn between the weights that produce its channels and those that reduce over them; pinned ones are grey.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from html import escape

import networkx as nx

from nm_compiler.axes.result import Axes, AxisClass

_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 210, 34, 300, 58, 24
_MOST = 60  # characters of a tooltip's list


def graph(axes: Axes) -> nx.DiGraph:
    """Weights (``kind="weight"``) and classes (``kind="class"``), joined in the direction of the data."""
    found = nx.DiGraph()
    for each in axes.classes:
        makers, readers = ({member.name for member in each.of(role)} for role in ("out", "in"))
        if not makers | readers:
            continue
        found.add_node(each.name, kind="class", each=each)
        for name in sorted(makers | readers):
            found.add_node(("weight", name), kind="weight")
        found.add_edges_from((("weight", name), each.name) for name in sorted(makers))
        found.add_edges_from((each.name, ("weight", name)) for name in sorted(readers))
    return found


def svg(axes: Axes) -> str:
    """The picture as an SVG document. Weights and classes carry their members as tooltips."""
    drawn = graph(axes)
    columns = _columns(drawn)
    places: dict[object, tuple[float, float]] = {
        node: (_MARGIN + column * _ACROSS / 2, _MARGIN + 40 + row * _DOWN)
        for column, nodes in enumerate(columns)
        for row, node in enumerate(nodes)
    }
    width = max((x for x, _ in places.values()), default=0) + _WIDTH + _MARGIN
    height = max((y for _, y in places.values()), default=0) + _HEIGHT + _MARGIN
    colours = dict(zip((each.name for each in axes.free), _colours(len(axes.free)), strict=True))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN}" font-size="15" font-weight="600" fill="#222">{len(axes.free)} free classes of '
        f"{len(axes)} coupled axes</text>",
        *_edges(drawn, places, colours),
        *_nodes(drawn, places, colours),
        "</svg>",
    ]
    return "\n".join(parts)


def _columns(drawn: nx.DiGraph) -> list[list[object]]:
    """Nodes by their distance from the input; what residual connections close into a cycle shares a column."""
    condensed = nx.condensation(drawn)
    layers = [
        [node for part in layer for node in sorted(condensed.nodes[part]["members"], key=str)]
        for layer in nx.topological_generations(condensed)
    ]
    return [layer[i : i + 40] for layer in layers for i in range(0, len(layer), 40)]


def _colours(count: int) -> Iterator[str]:
    for index in range(count):
        red, green, blue = colorsys.hls_to_rgb((index * 0.618) % 1, 0.42, 0.65)
        yield f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def _edges(drawn: nx.DiGraph, places: dict[object, tuple[float, float]], colours: dict[str, str]) -> Iterator[str]:
    for start, end in drawn.edges:
        (x0, y0), (x1, y1) = places[start], places[end]
        x0, y0, y1 = x0 + _WIDTH * 0.62, y0 + _HEIGHT / 2, y1 + _HEIGHT / 2
        bend = max(40.0, abs(x1 - x0) / 2)
        name = start if isinstance(start, str) else end
        colour = colours.get(name, "#c8c8c8")
        yield (
            f'<path d="M{x0:.0f},{y0:.0f} C{x0 + bend:.0f},{y0:.0f} {x1 - bend:.0f},{y1:.0f} {x1:.0f},{y1:.0f}" fill="none" '
            f'stroke="{colour}" stroke-width="2" opacity="0.75"/>'
        )


def _nodes(drawn: nx.DiGraph, places: dict[object, tuple[float, float]], colours: dict[str, str]) -> Iterator[str]:
    width = _WIDTH * 0.62
    for node, data in drawn.nodes(data=True):
        x, y = places[node]
        if data["kind"] == "class":
            each: AxisClass = data["each"]
            colour, label = colours.get(each.name, "#9a9a9a"), f"{each.size}" + "".join(f" x {n} rows" for n in each.rows)
            title = each.name + (f": pinned, {each.pinned}" if each.pinned else ": free") + "\n"
            title += ", ".join(str(member) for member in each.members[:_MOST])
            shape = f'<rect x="{x:.0f}" y="{y + 5:.0f}" width="{width:.0f}" height="{_HEIGHT - 10}" rx="12" fill="{colour}"/>'
            text = f'<text x="{x + width / 2:.0f}" y="{y + 21:.0f}" text-anchor="middle" fill="#fff">{escape(label)}</text>'
        else:
            name = node[1].removesuffix(".weight")
            label, title = (name if len(name) < 19 else "…" + name[-18:]), node[1]
            shape = (
                f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{_HEIGHT}" rx="4" fill="#f4f4f2" stroke="#555"/>'
            )
            text = f'<text x="{x + width / 2:.0f}" y="{y + 21:.0f}" text-anchor="middle" fill="#222">{escape(label)}</text>'
        yield f"<g><title>{escape(title)}</title>{shape}{text}</g>"
