"""Look-ups: the axis that indices point into keeps its order, the axes of the indices and all others go through.

Sorting and top-k belong here: what they return along their axis depends on values alone, and the indices that come with it
point into the axis.
"""

from __future__ import annotations

from typing import Any

import torch

from nm_compiler.axes.analysis import Analysis, Call, Dims, Rule, Value, named
from nm_compiler.axes.rules.parts import pieces, renewed, without
from nm_compiler.axes.rules.reductions import values_only


def embedding(a: Analysis, call: Call) -> Value:
    """Rows of a table."""
    table, indices = a.dims(call["weight"]), a.dims(call["indices"])
    a.pin(table[:1], "rows of an embedding are looked up by number")
    a.mixed(table, (0,))
    return (*indices, *table[1:])


def index(a: Analysis, call: Call) -> Value:
    """``x[i, :, j]`` with tensors of numbers, or of booleans, which pin what they choose from."""
    x = a.dims(call["self"])
    given = call["indices"]
    if (run := _run(a, given)) is not None:
        axis, first, length = run
        first %= x[axis].size
        return pieces(a, x, axis, [first, length, x[axis].size - first - length], "index takes a run of it")[1]
    indexed: list[Dims] = []
    positions: list[int] = []
    axis = 0
    for item in given:
        if item is None:
            axis += 1
            continue
        dims = a.dims(item)
        chooses = str(item.meta["val"].dtype) in ("torch.bool", "torch.uint8")
        width = len(dims) if chooses else 1
        if chooses:
            a.pin(dims, "a boolean index counts what it keeps")
        positions.extend(range(axis, axis + width))
        count = a.shape(call.node)[_place(given)]
        indexed.append((a.terms.leaf(count, "a boolean index counts what it keeps"),) if chooses else dims)
        axis += width
    a.pin((x[i] for i in positions), "entries are looked up by number")
    a.mixed(x, positions)
    looked_up = a.broadcast(indexed, "index aligns its indices")
    kept = [term for i, term in enumerate(x) if i not in positions]
    start = _place(given)
    return (*kept[:start], *looked_up, *kept[start:])


def _run(a: Analysis, given: list[object]) -> tuple[int, int, int] | None:
    """Axis, start and length, where the only index is a constant list of consecutive numbers: a slice in disguise."""
    (axis, node), *others = [(i, item) for i, item in enumerate(given) if item is not None]
    numbers = a.constant(node) if not others else None
    if numbers is None or numbers.ndim != 1 or numbers.numel() == 0 or numbers.dtype != torch.int64:
        return None
    first = int(numbers[0])
    across = first < 0 <= first + len(numbers) - 1  # from the end on to the beginning
    run = numbers.tolist() == list(range(first, first + len(numbers)))
    return (axis, first, len(numbers)) if run and not across else None


def _place(given: list[object]) -> int:
    """Where the looked-up axes go: at the first indexed one, or at the front when indexed axes lie apart."""
    at = [i for i, item in enumerate(given) if item is not None]
    return at[0] if at[-1] - at[0] == len(at) - 1 else 0


def index_select(a: Analysis, call: Call) -> Value:
    """Entries of one axis by number."""
    x = a.dims(call["self"])
    axis = call["dim"] % len(x)
    a.pin((x[axis],), "entries are looked up by number")
    a.mixed(x, (axis,))
    return (*x[:axis], *a.dims(call["index"]), *x[axis + 1 :])


def gather(a: Analysis, call: Call) -> Value:
    """Entries of one axis by number, other numbers for every position along the other axes."""
    x, indices = a.dims(call["self"]), a.dims(call.get("index", call.get("indices")))
    axis = call["dim"] % len(x)
    a.pin((x[axis],), "entries are looked up by number")
    _align(a, x, indices, axis)
    a.mixed(x, (axis,))
    return indices


def scatter(a: Analysis, call: Call) -> Value:
    """Entries written to places along one axis, by number; the other axes meet."""
    x, indices = a.dims(call["self"]), a.dims(call["index"])
    axis = call["dim"] % len(x)
    source = a.dims(call.get("src", call.get("source"))) if call.get("value") is None else ()
    a.pin((x[axis],), "entries are written by number")
    if len(indices) == len(x):  # scatter: an index for every entry
        _align(a, x, indices, axis)
        if source:
            a.unify(indices[axis], source[axis], "scatter aligns them")
    elif source:  # index_add, index_copy: an index for every row
        a.unify(indices[0], source[axis], f"{call.name} aligns them")
    if source:
        _align(a, x, source, axis)
    a.mixed(x, (axis,))
    return x


def index_put(a: Analysis, call: Call) -> Value:
    """``x[i, :, j] = values``."""
    x, given = a.dims(call["self"]), call["indices"]
    positions = [i for i, item in enumerate(given) if item is not None]
    kinds = [str(given[i].meta["val"].dtype) for i in positions]
    if {"torch.bool", "torch.uint8"} & set(kinds):
        return _put_where(a, x, given, a.dims(call["values"]))
    a.pin((x[i] for i in positions), "entries are written by number")
    looked_up = a.broadcast([a.dims(given[i]) for i in positions], "index aligns its indices")
    kept = [term for i, term in enumerate(x) if i not in positions]
    start = _place(given)
    a.broadcast([(*kept[:start], *looked_up, *kept[start:]), a.dims(call["values"])], "an assignment aligns them")
    a.mixed(x, positions)
    return x


def _put_where(a: Analysis, x: Dims, given: list[Any], values: Dims) -> Value:
    """``x[mask] = values``: elementwise for one value; else the entries that the mask chooses are counted."""
    (mask,) = given  # a mask behind other axes has no rule
    chosen, rest = x[: len(a.dims(mask))], x[len(a.dims(mask)) :]
    a.broadcast([chosen, a.dims(mask)], "a mask aligns with what it chooses from")
    a.spaces.append(x)
    if len(values) > len(rest) and values[0].size != 1:
        a.pin((*chosen, values[0]), "a boolean index counts what it keeps")
        a.mixed(x, range(len(chosen)))
        values = values[1:]
    a.broadcast([rest, values[-len(rest) :] if rest else ()], "an assignment aligns them")
    return x


def filled(a: Analysis, call: Call) -> Value:
    """``index_fill``: entries along one axis, by number, become one value."""
    x = a.dims(call["self"])
    axis = call["dim"] % len(x)
    a.pin((x[axis],), "entries are written by number")
    a.mixed(x, (axis,))
    return x


def counted(a: Analysis, call: Call) -> Value:
    """``masked_scatter``: entries are taken one after the other."""
    x = a.dims(call["self"])
    given = [a.dims(node) for node in call.node.all_input_nodes]
    a.broadcast([x, a.dims(call["mask"])], "a mask aligns with what it chooses from")
    a.pin((term for dims in given for term in dims), "entries are taken one after the other")
    return renewed(a, x, range(len(x)), a.shape(call.node), "entries are taken one after the other")


def ranked(a: Analysis, call: Call) -> Value:
    """``sort``, ``topk``, ``argsort``: ranks along an axis; the numbers that come with them point into it."""
    x = a.dims(call["self"])
    axis = (0 if call.name == "msort" else call["dim"]) % len(x)
    val = call.node.meta["val"]
    sizes = a.sizes(val[0] if isinstance(val, (tuple, list)) else val)
    why = f"{call.name} tells positions along it"
    if call.name == "msort" or values_only(call):  # the same values come out, whatever the order they go in
        a.mixed(x, (axis,))
        result: Dims = tuple(a.terms.leaf(sizes[i], why) if i == axis else term for i, term in enumerate(x))
    else:
        result = renewed(a, x, [axis], sizes, why)
    return (result, result) if isinstance(val, (tuple, list)) else result


def difference(a: Analysis, call: Call) -> Value:
    """``diff``: neighbours are compared, those at the ends with what is put before or after."""
    x, why = a.dims(call["self"]), "diff compares neighbours"
    axis = call["dim"] % len(x)
    for end in (a.dims(call[name]) for name in ("prepend", "append") if call[name] is not None):
        a.pin((end[axis],), why)
        a.broadcast([without(x, axis), without(end, axis)], "diff aligns its ends")
        a.mixed(end, (axis,))
    return renewed(a, x, [axis], a.shape(call.node), why)


def counts(a: Analysis, call: Call) -> Value:
    """``one_hot``, ``bincount``, ``histc``: values become positions along a new axis."""
    dims = a.dims(call["self"])
    if call.get("weights") is not None:
        a.broadcast([dims, a.dims(call["weights"])], f"{call.name} aligns its weights")
    dims = dims if call.name == "one_hot" else ()
    return (*dims, a.terms.leaf(a.shape(call.node)[-1], f"{call.name} counts along it"))


def bucketed(a: Analysis, call: Call) -> Value:
    """``bucketize`` and ``searchsorted``: where a value lies among sorted boundaries."""
    x, boundaries = call["self"], call.get("boundaries", call.get("sorted_sequence"))
    edges = a.dims(boundaries)
    assert len(edges) == 1
    assert call.get("sorter") is None
    a.pin(edges, f"{call.name} needs it sorted")
    return a.dims(x)


def _align(a: Analysis, x: Dims, other: Dims, axis: int) -> None:
    for i, (first, second) in enumerate(zip(x, other, strict=True)):
        if i != axis:
            if first.size == second.size:
                a.unify(first, second, "a look-up aligns them")
            else:
                a.pin((first, second), "a look-up reads only a part of it")


RULES: dict[str, Rule] = {
    "embedding": embedding,
    "index": index,
    "_unsafe_index": index,
    "index_select": index_select,
    **named("gather take_along_dim", gather),
    **named("scatter scatter_add scatter_reduce index_add index_copy index_reduce", scatter),
    **named("index_put _unsafe_index_put", index_put),
    "index_fill": filled,
    "masked_scatter": counted,
    **named("sort topk argsort msort", ranked),
    "diff": difference,
    **named("one_hot bincount histc", counts),
    **named("bucketize searchsorted", bucketed),
}
