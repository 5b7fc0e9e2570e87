"""The coupled axes of a model, as a value to print, to ask and to draw.

A *class* is a set of weight axes that one order must permute together. An axis of a weight is described by an expression over
classes: most are one class; a merged axis is a `Product`, a concatenated one a `Sum`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from nm_compiler.wording import several


@dataclass(frozen=True, slots=True)
class Leaf:
    """All entries of one class. size: how many."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Product:
    """A slow axis times faster ones, as a reshape merges them."""

    parts: tuple[Axis, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Sum:
    """One axis after the other, as a concatenation makes them."""

    parts: tuple[Axis, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Family:
    """Ordered as ``parts[i]`` where another axis of the same tensor is in its part ``keys[i]``."""

    keys: tuple[Axis, ...]
    parts: tuple[Axis, ...]
    size: int


Axis: TypeAlias = Leaf | Product | Sum | Family


def leaves(axis: Axis) -> Iterator[Leaf]:
    """The classes an axis is made of, in the order of its entries."""
    if isinstance(axis, Leaf):
        yield axis
    else:
        for part in axis.parts:
            yield from leaves(part)


def restricted(axis: Axis, part: Axis) -> Axis:
    """``axis`` where another axis of the tensor is in its ``part``: families keyed by it are their member for it."""
    if isinstance(axis, Leaf):
        return axis
    if isinstance(axis, Family):
        return next((inner for key, inner in zip(axis.keys, axis.parts, strict=True) if key == part), axis)
    return type(axis)(tuple(restricted(inner, part) for inner in axis.parts), axis.size)


@dataclass(frozen=True, slots=True)
class Member:
    """One axis of a parameter or buffer that a class is part of. role: "in" (reduced), "out" (output channels) or "with"."""

    name: str
    axis: int
    role: str

    def __str__(self) -> str:
        return f"{self.name}[{self.axis}]"


@dataclass(frozen=True, slots=True)
class AxisClass:
    """Axes permuted by one order.

    name: of the first weight axis in it; size: entries; needs: classes on which the order may depend, and rows: their sizes,
    so that an order is an int64 tensor ``[*rows, size]``; pinned: why it keeps its order, or None where it is free.
    """

    name: str
    size: int
    needs: tuple[str, ...]
    rows: tuple[int, ...]
    members: tuple[Member, ...]
    pinned: str | None

    @property
    def free(self) -> bool:
        """Whether it can be permuted."""
        return self.pinned is None

    def of(self, role: str) -> tuple[Member, ...]:
        """The members of a role."""
        return tuple(member for member in self.members if member.role == role)


@dataclass(frozen=True, slots=True)
class Axes:
    """What is coupled to what in a model.

    classes: in the order of the model's parameters; state: for every parameter and buffer that the graphs read, one
    expression an axis; outputs: those that keep their order; unknown: ops without a rule, with how many axes each pinned.
    """

    classes: tuple[AxisClass, ...]
    state: Mapping[str, tuple[Axis, ...]]
    outputs: tuple[str, ...]
    unknown: Mapping[str, int]

    def __iter__(self) -> Iterator[AxisClass]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, name: str) -> AxisClass:
        """The class of a name, or the one that a weight's axis ``"fc.weight[0]"`` consists of. Raises KeyError."""
        for each in self.classes:
            if each.name == name:
                return each
        for each in self.classes:
            for member in each.members:
                if str(member) == name and len(list(leaves(self.state[member.name][member.axis]))) == 1:
                    return each
        raise KeyError(name)

    @property
    def free(self) -> tuple[AxisClass, ...]:
        """The classes that can be permuted."""
        return tuple(each for each in self.classes if each.free)

    def is_free(self, name: str, axis: int) -> bool:
        """Whether anything along an axis of a parameter can be permuted."""
        names = {leaf.name for leaf in leaves(self.state[name][axis])} if name in self.state else set()
        return any(each.free and each.name in names for each in self.classes)

    def draw(self, path: str) -> None:
        """Write a picture to ``path`` (SVG): weights in the order of the data, joined by the classes they share."""
        from nm_compiler.axes.draw import svg

        with open(path, "w", encoding="utf-8") as file:
            file.write(svg(self))

    def __str__(self) -> str:
        """A line a free class with its members; pinned classes by their reason; ops without a rule."""
        return "\n".join(_lines(self))


def _lines(axes: Axes) -> Iterator[str]:
    free = axes.free
    yield f"{len(free)} free classes of {len(axes)}; outputs that keep their order: {', '.join(axes.outputs) or 'none'}"
    width = max((len(each.name) for each in free), default=0)
    for each in free:
        rows = f" x {' x '.join(map(str, each.rows))} rows of {', '.join(each.needs)}" if each.rows else ""
        yield f"  {each.name:{width}}  size {each.size}{rows}"
        for role, word in (("out", "outputs of"), ("in", "inputs of"), ("with", "along with")):
            if members := each.of(role):
                yield f"    {word:10} {several([str(m) for m in members], 6)}"
    reasons: dict[str, list[AxisClass]] = {}
    for each in axes.classes:
        if each.pinned:
            reasons.setdefault(each.pinned, []).append(each)
    if reasons:
        yield f"{len(axes) - len(free)} pinned"
    for reason, pinned in reasons.items():
        yield f"  {reason}: {several([each.name for each in pinned], 6)}"
    for op, count in axes.unknown.items():
        yield f"  no rule for {op}: it pinned {count} {'axis' if count == 1 else 'axes'}"
