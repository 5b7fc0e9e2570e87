"""Ops that take an axis apart or put one together: the terms become sums.

Cutting one axis may set free the others: where ``reshape(3, heads, dim)`` is unbound along the 3, queries, keys and values
each get a ``dim`` of their own (a family, see `nm_compiler.axes.terms`).
"""

from __future__ import annotations

from collections.abc import Sequence

from nm_compiler.axes.analysis import Analysis, Call, Dims, Rule, Value, named
from nm_compiler.axes.terms import Term


def pieces(a: Analysis, dims: Dims, axis: int, sizes: Sequence[int], why: str) -> list[Dims]:
    """``dims`` cut along ``axis`` into consecutive pieces; the other axes as they are ordered within each piece."""
    whole = dims[axis]
    if sum(sizes) != whole.size:  # sizes that depend on data
        a.pin((whole,), why)
        a.mixed(dims, (axis % len(dims),))
        loose = [a.terms.one if size == 1 else a.terms.leaf(size, why) for size in sizes]
        return [(*dims[: axis % len(dims)], part, *without(dims, axis)[axis % len(dims) :]) for part in loose]
    parts = a.terms.cut(whole, sizes, why) if whole.size != 1 else [whole if size else a.terms.leaf(0) for size in sizes]
    return [
        tuple(part if i == axis % len(dims) else a.terms.within(other, part, whole) for i, other in enumerate(dims))
        for part in parts
    ]


def without(dims: Dims, axis: int) -> Dims:
    """``dims`` less one axis."""
    axis %= len(dims)
    return (*dims[:axis], *dims[axis + 1 :])


def cat(a: Analysis, call: Call) -> Value:
    """Concatenation: the axis is the sum of the inputs' axes, all other axes meet."""
    many = [dims for node in call["tensors"] if (dims := a.dims(node)) and not (len(dims) == 1 and dims[0].size == 0)]
    axis = call.get("dim", 0) % len(many[0])
    others = a.broadcast([without(dims, axis) for dims in many], "cat aligns them")
    whole = a.terms.sum(_entries(a, dims[axis]) for dims in many)
    size = a.shape(call.node)[axis]
    if whole.size != size:  # sizes that depend on data
        a.pin((whole,), "cat of parts whose sizes depend on data")
        whole = a.terms.leaf(size, "cat of parts whose sizes depend on data")
    return (*others[:axis], whole, *others[axis:])


def _entries(a: Analysis, term: Term) -> Term:
    """An axis of size 1 becomes an entry among others, and can be told from them."""
    return a.terms.leaf(1) if term is a.terms.one else term


def stack(a: Analysis, call: Call) -> Value:
    """Concatenation along a new axis."""
    many = [a.dims(node) for node in call["tensors"]]
    others = a.broadcast(many, "stack aligns them")
    axis = call["dim"] % (len(others) + 1)
    new = a.terms.sum(a.terms.leaf(1) for _ in many) if len(many) > 1 else a.terms.one
    return (*others[:axis], new, *others[axis:])


def split(a: Analysis, call: Call) -> Value:
    """``split``, ``chunk``, ``split_with_sizes``, ``tensor_split``: consecutive pieces."""
    dims = a.dims(call.node.args[0])
    axis = call.get("dim", 0) % len(dims)
    sizes = [a.sizes(piece)[axis] for piece in call.node.meta["val"]]
    return tuple(pieces(a, dims, axis, sizes, f"{call.name} cuts across it"))


def unbind(a: Analysis, call: Call) -> Value:
    """Every entry of an axis by itself."""
    dims = a.dims(call["self"])
    axis = call["dim"] % len(dims)
    return tuple(without(piece, axis) for piece in pieces(a, dims, axis, [1] * dims[axis].size, "unbind takes it apart"))


def select(a: Analysis, call: Call) -> Value:
    """One entry of an axis."""
    dims = a.dims(call["self"])
    axis, index = call["dim"] % len(dims), call["index"]
    size = dims[axis].size
    assert isinstance(index, int)
    index %= size
    return without(pieces(a, dims, axis, [index, 1, size - index - 1], f"select takes entry {index}")[1], axis)


def slices(a: Analysis, call: Call) -> Value:
    """A run of an axis; every second entry and the like have no term, and pin it."""
    dims = a.dims(call["self"])
    axis = call["dim"] % len(dims)
    size, length = dims[axis].size, a.shape(call.node)[axis]
    if length == size:
        return dims
    start = a.size(call["start"] or 0)
    start = min(start + size if start < 0 else start, size)
    if call["step"] != 1:
        return renewed(a, dims, [axis], a.shape(call.node), "slice takes every few entries")
    return pieces(a, dims, axis, [start, length, size - start - length], "slice cuts across it")[1]


def narrow(a: Analysis, call: Call) -> Value:
    """A run of an axis, by start and length."""
    dims = a.dims(call["self"])
    axis = call["dim"] % len(dims)
    size, length, start = dims[axis].size, a.shape(call.node)[axis], a.size(call["start"])
    start = start + size if start < 0 else start
    return pieces(a, dims, axis, [start, length, size - start - length], "narrow cuts across it")[1]


def glu(a: Analysis, call: Call) -> Value:
    """The first half of an axis, gated by the second."""
    dims = a.dims(call["self"])
    axis = call["dim"] % len(dims)
    half = dims[axis].size // 2
    return a.broadcast(pieces(a, dims, axis, [half, half], "glu cuts across it"), "glu aligns its halves")


def moved(a: Analysis, call: Call) -> Value:
    """``flip`` and ``roll``: entries change places along the axis, which keeps its order."""
    dims = a.dims(call["self"])
    axes = call["dims"] or range(len(dims))
    return renewed(a, dims, [axes] if isinstance(axes, int) else axes, a.shape(call.node), f"{call.name} moves its entries")


def pad(a: Analysis, call: Call) -> Value:
    """Constant padding adds equal entries at both ends (or cuts some off); other modes copy neighbours."""
    dims = list(a.dims(call["self"]))
    widths = [a.size(width) for width in call["pad"]]
    if call.get("mode", "constant") != "constant":
        axes = [len(dims) - 1 - i for i in range(len(widths) // 2) if any(widths[2 * i : 2 * i + 2])]
        return renewed(a, tuple(dims), axes, a.shape(call.node), f"pad with {call['mode']} copies its neighbours")
    for i, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        axis = len(dims) - 1 - i
        cut = [max(-before, 0), dims[axis].size - max(-before, 0) - max(-after, 0), max(-after, 0)]
        if before or after:
            dims = list(pieces(a, tuple(dims), axis, cut, "pad cuts it")[1])
            ends = (a.terms.leaf(max(before, 0)), a.terms.leaf(max(after, 0)))
            dims[axis] = a.terms.sum((ends[0], _entries(a, dims[axis]), ends[1]))
    return tuple(dims)


def unfold(a: Analysis, call: Call) -> Value:
    """Overlapping windows along an axis, as a new last axis."""
    dims = a.dims(call["self"])
    sizes = a.shape(call.node)
    axis = call["dimension"] % len(dims)
    return (*renewed(a, dims, [axis], sizes[:-1], "unfold reads windows"), a.terms.leaf(sizes[-1], "unfold reads windows"))


def diagonal(a: Analysis, call: Call) -> Value:
    """Two axes become one that compares them, at the end."""
    dims = a.dims(call["self"])
    axes = {call["dim1"] % len(dims), call["dim2"] % len(dims)}
    a.pin((dims[axis] for axis in axes), "diagonal compares its positions")
    a.mixed(dims, axes)
    return (*(t for i, t in enumerate(dims) if i not in axes), a.terms.leaf(a.shape(call.node)[-1], "diagonal"))


def turned(a: Analysis, call: Call) -> Value:
    """``rot90``: two axes change places, one of them backwards."""
    dims = list(a.dims(call["self"]))
    first, second = (axis % len(dims) for axis in call["dims"])
    turned = list(renewed(a, tuple(dims), [first, second], [term.size for term in dims], "rot90 turns it"))
    if call["k"] % 2:
        turned[first], turned[second] = turned[second], turned[first]
    return tuple(turned)


def renewed(a: Analysis, dims: Dims, axes: Sequence[int], sizes: Sequence[int], why: str) -> Dims:
    """``dims`` after an op that mixes entries along ``axes``: those are pinned, before and after."""
    chosen = {axis % len(dims) for axis in axes}
    a.pin((dims[axis] for axis in chosen), why)
    a.mixed(dims, chosen)
    return tuple(a.terms.leaf(size, why) if i in chosen and size != 1 else dims[i] if i not in chosen else a.terms.one
                 for i, size in enumerate(sizes))  # fmt: skip


RULES: dict[str, Rule] = {
    **named("cat concat concatenate", cat),
    "stack": stack,
    **named("split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes", split),
    "unbind": unbind,
    "select": select,
    "slice": slices,
    "narrow": narrow,
    "glu": glu,
    **named("flip roll", moved),
    **named("pad constant_pad_nd", pad),
    "rot90": turned,
    "unfold": unfold,
    "diagonal": diagonal,
}
