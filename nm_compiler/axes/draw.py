"""A picture of coupled axes: the model's layers from top to bottom, a coloured line for every class of axes they share.

    fc1   *        filled: its outputs are permuted
          |
    fc2   o  *     hollow: it reduces over them; small: its entries go along (biases, norms, buffers)
             |
    fc3      o

Lines that do not overlap share a column, so that a chain of layers stays narrow and a residual stream stands out as one long
line. Pinned classes are grey.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from nm_compiler.axes.result import Axes, AxisClass, Member

_ROW, _LANE, _MARGIN, _TOP, _CHARACTER = 34, 64, 24, 76, 7.2  # pixels
_TENSORS = ("weight", "bias", "running_mean", "running_var")  # of one layer, which is drawn as one row
_MOST = 40  # members named by a tooltip
_GREY = "#b4b4b4"


@dataclass(frozen=True)
class _Line:
    """A class and the rows it touches, with the roles it plays in each."""

    each: AxisClass
    roles: dict[int, set[str]]
    colour: str

    @property
    def first(self) -> int:
        return min(self.roles)

    @property
    def last(self) -> int:
        return max(self.roles)

    @property
    def label(self) -> str:
        rows = " · ".join(map(str, self.each.rows))
        return f"{rows} x {self.each.size}" if rows else str(self.each.size)


def svg(axes: Axes) -> str:
    """The picture as an SVG document. Classes and layers carry what they are in full as tooltips."""
    shown = {member.name for each in axes if _drawable(each) for member in each.members}
    layers = list(dict.fromkeys(_layer(name) for name in axes.state if name in shown))
    lanes = _lanes(_lines(axes, layers))
    left = _MARGIN + max((len(layer) for layer in layers), default=0) * _CHARACTER + _LANE / 2
    width = max(left + len(lanes) * _LANE + _MARGIN, 600)
    height = _TOP + len(layers) * _ROW + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 4}" font-size="15" font-weight="600" fill="#222">{len(axes.free)} free classes of '
        f"{len(axes)} coupled axes</text>",
        *_legend(),
        *_rows(layers, left, width),
        *(part for at, lane in enumerate(lanes) for line in lane for part in _drawn(line, left + at * _LANE + _LANE / 2)),
        "</svg>",
    ]
    return "\n".join(parts)


def _layer(name: str) -> str:
    """The layer that a tensor belongs to; a tensor with a name of its own is a row of its own."""
    owner, _, leaf = name.rpartition(".")
    return owner if owner and leaf in _TENSORS else name


def _lines(axes: Axes, layers: Sequence[str]) -> Iterator[_Line]:
    row = {layer: index for index, layer in enumerate(layers)}
    colours = dict(zip((each.name for each in axes.free), _colours(len(axes.free)), strict=True))
    for each in filter(_drawable, axes):
        roles: dict[int, set[str]] = {}
        for member in each.members:
            roles.setdefault(row[_layer(member.name)], set()).add(member.role)
        yield _Line(each, roles, colours.get(each.name, _GREY))


def _drawable(each: AxisClass) -> bool:
    """Every free class, and the pinned ones that are inputs or outputs of a product."""
    return each.free or bool(each.of("in") or each.of("out"))


def _lanes(lines: Iterator[_Line]) -> list[list[_Line]]:
    """Lines side by side where they overlap; the longest come first."""
    lanes: list[list[_Line]] = []
    for line in sorted(lines, key=lambda line: (line.each.pinned is not None, line.first - line.last, line.first)):
        lane = next((lane for lane in lanes if all(line.last < o.first or o.last < line.first for o in lane)), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(line)
    return lanes


def _colours(count: int) -> Iterator[str]:
    for index in range(count):
        red, green, blue = colorsys.hls_to_rgb((0.58 + index * 0.618) % 1, 0.42, 0.62)
        yield f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def _legend() -> Iterator[str]:
    x, y = float(_MARGIN), _MARGIN + 26
    for roles, text in (({"out"}, "outputs of"), ({"in"}, "inputs of"), ({"with"}, "along with")):
        yield from _mark(x + 5, y - 4, roles, "#555")
        yield f'<text x="{x + 16:.0f}" y="{y}" fill="#555">{text}</text>'
        x += 28 + len(text) * _CHARACTER
    yield f'<text x="{x:.0f}" y="{y}" fill="#555">· rows x size of an order · grey: pinned</text>'


def _rows(layers: Sequence[str], left: float, width: float) -> Iterator[str]:
    for index, layer in enumerate(layers):
        y = _TOP + index * _ROW + _ROW / 2
        if index % 2 == 0:
            yield f'<rect x="0" y="{y - _ROW / 2:.0f}" width="{width:.0f}" height="{_ROW}" fill="#f6f6f4"/>'
        yield f'<text x="{left - 8:.0f}" y="{y + 4:.0f}" text-anchor="end" fill="#222">{escape(layer)}</text>'


def _drawn(line: _Line, x: float) -> Iterator[str]:
    """The line from its first layer to its last, its marks, and its size above."""
    above, below = (_TOP + row * _ROW + _ROW / 2 for row in (line.first, line.last))
    yield f"<g><title>{escape(_title(line.each))}</title>"
    yield f'<path d="M{x:.0f},{above:.0f} V{below:.0f}" stroke="{line.colour}" stroke-width="3"/>'
    for row, roles in sorted(line.roles.items()):
        yield from _mark(x, _TOP + row * _ROW + _ROW / 2, roles, line.colour)
    middle = f'x="{x:.0f}" y="{above - 9:.0f}" text-anchor="middle"'
    yield f'<text {middle} font-size="10" fill="{line.colour}">{line.label}</text></g>'


def _mark(x: float, y: float, roles: set[str], colour: str) -> Iterator[str]:
    size, fill = (6, colour if "out" in roles else "#fff") if roles & {"in", "out"} else (3, colour)
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{fill}" stroke="{colour}" stroke-width="2.5"/>'
    if {"in", "out"} <= roles:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="#fff"/>'


def _title(each: AxisClass) -> str:
    members: Sequence[Member] = each.members[:_MOST]
    more = f" and {len(each.members) - _MOST} more" if len(each.members) > _MOST else ""
    return f"{each.name}: {'pinned, ' + each.pinned if each.pinned else 'free'}\n{', '.join(map(str, members))}{more}"
