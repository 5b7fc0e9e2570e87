"""Ops that move axes or cut and merge them without touching an entry."""

from __future__ import annotations

from nm_compiler.axes.analysis import Analysis, Call, Rule, Value, named
from nm_compiler.axes.terms import Term


def reshape(a: Analysis, call: Call) -> Value:
    """Any view that keeps the entries in row-major order: factors are merged and split where sizes say so."""
    return a.regroup(a.dims(call.node.args[0]), a.shape(call.node), f"{call.name} cuts across it")


def permute(a: Analysis, call: Call) -> Value:
    """Axes in another order."""
    dims = a.dims(call["self"])
    return tuple(dims[int(axis)] for axis in call["dims"])


def transpose(a: Analysis, call: Call) -> Value:
    """Two axes change places."""
    dims = list(a.dims(call["self"]))
    if dims:
        first, second = (call.get(new, call.get(old)) for new, old in (("dim0", "axis0"), ("dim1", "axis1")))
        dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def last_two(a: Analysis, call: Call) -> Value:
    """``t`` and ``mT``: the last two axes change places."""
    dims = a.dims(call.node.args[0])
    return (*dims[:-2], *dims[:-3:-1])


def reversed_axes(a: Analysis, call: Call) -> Value:
    """``x.T`` of any rank."""
    return a.dims(call.node.args[0])[::-1]


def movedim(a: Analysis, call: Call) -> Value:
    """Some axes are taken out and put in at other places."""
    dims = a.dims(call["self"])
    source, target = ([x] if isinstance(x, int) else list(x) for x in (call["source"], call["destination"]))
    placed = {t % len(dims): dims[s] for s, t in zip(source, target, strict=True)}
    taken = {s % len(dims) for s in source}
    rest = iter(term for i, term in enumerate(dims) if i not in taken)
    return tuple(placed[i] if i in placed else next(rest) for i in range(len(dims)))


def unsqueeze(a: Analysis, call: Call) -> Value:
    """A new axis of size 1."""
    dims = list(a.dims(call["self"]))
    dims.insert(call["dim"] % (len(dims) + 1), a.terms.one)
    return tuple(dims)


def repeat(a: Analysis, call: Call) -> Value:
    """``repeat`` and ``tile``: copies one after the other; the copies are equal, their order is free."""
    dims = a.dims(call["self"])
    sizes = a.shape(call.node)
    dims = (*(a.terms.one for _ in range(len(sizes) - len(dims))), *dims)
    return tuple(_copies(a, term, size) for term, size in zip(dims, sizes, strict=True))


def _copies(a: Analysis, term: Term, size: int) -> Term:
    return term if term.size == size else a.terms.product((a.terms.leaf(size // term.size), term))


def repeat_interleave(a: Analysis, call: Call) -> Value:
    """Every entry several times in a row."""
    dims = list(a.dims(call["self"]))
    axis = call["dim"]
    assert isinstance(call["repeats"], int)
    assert axis is not None
    copies = a.shape(call.node)[axis] // dims[axis].size
    dims[axis] = a.terms.product((dims[axis], a.terms.leaf(copies)))
    return tuple(dims)


def pixel_shuffle(a: Analysis, call: Call) -> Value:
    """``[*, c r r, h, w] -> [*, c, h r, w r]``."""
    *batch, channels, height, width = a.dims(call["self"])
    r = call["upscale_factor"]
    c, rows, columns = a.regroup((channels,), (channels.size // r // r, r, r), "pixel_shuffle cuts across it")
    return (*batch, c, a.terms.product((height, rows)), a.terms.product((width, columns)))


def pixel_unshuffle(a: Analysis, call: Call) -> Value:
    """``[*, c, h r, w r] -> [*, c r r, h, w]``."""
    *batch, channels, height, width = a.dims(call["self"])
    r = call["downscale_factor"]
    why = "pixel_unshuffle cuts across it"
    (h, rows), (w, columns) = (a.regroup((t,), (t.size // r, r), why) for t in (height, width))
    return (*batch, a.terms.product((channels, rows, columns)), h, w)


def channel_shuffle(a: Analysis, call: Call) -> Value:
    """``[n, g c, ...] -> [n, c g, ...]``."""
    batch, channels, *rest = a.dims(call["self"])
    groups = call["groups"]
    slow, fast = a.regroup((channels,), (groups, channels.size // groups), "channel_shuffle cuts across it")
    return (batch, a.terms.product((fast, slow)), *rest)


def meshgrid(a: Analysis, call: Call) -> Value:
    """Vectors, each repeated along the axes of all others."""
    size = len(call["tensors"])
    at = [1, 0, *range(2, size)] if call.get("indexing") == "xy" and size > 1 else list(range(size))
    axes = [a.dims(node)[0] for node in call["tensors"]]
    return tuple(
        tuple(
            axis if at[j] == i else a.terms.one if axes[at[j]].size == 1 else a.terms.leaf(axes[at[j]].size)
            for j in range(size)
        )
        for i, axis in enumerate(axes)
    )


def view_as_complex(a: Analysis, call: Call) -> Value:
    """Pairs along the last axis become complex numbers."""
    *dims, pair = a.dims(call["self"])
    a.pin([pair], "view_as_complex reads pairs")
    a.mixed((*dims, pair), (len(dims),))
    return tuple(dims)


def view_as_real(a: Analysis, call: Call) -> Value:
    """Complex numbers become pairs along a new last axis."""
    return (*a.dims(call["self"]), a.terms.leaf(2, "view_as_real makes pairs"))


RULES: dict[str, Rule] = {
    **named("view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze _reshape_alias ravel", reshape),
    "permute": permute,
    **named("transpose swapaxes swapdims", transpose),
    **named("t mT adjoint matrix_H", last_two),
    **named("numpy_T T", reversed_axes),
    **named("movedim moveaxis", movedim),
    "unsqueeze": unsqueeze,
    **named("repeat tile", repeat),
    "repeat_interleave": repeat_interleave,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **named("channel_shuffle native_channel_shuffle", channel_shuffle),
    "meshgrid": meshgrid,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
}
