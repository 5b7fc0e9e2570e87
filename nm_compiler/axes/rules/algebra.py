"""Products that are written out: outer and inner products, products over several axes, and what reads a diagonal."""

from __future__ import annotations

from nm_compiler.axes.analysis import Analysis, Call, Dims, Rule, Value, named
from nm_compiler.axes.rules.products import matmul_dims


def outer(a: Analysis, call: Call) -> Value:
    """Every entry of a vector times every entry of another."""
    (first,), (second,) = (a.dims(node) for node in call.node.args[:2])
    return (first, second)


def kron(a: Analysis, call: Call) -> Value:
    """Blocks: an axis of the first is the slow factor, that of the second the fast one."""
    first, second = (a.dims(node) for node in call.node.args[:2])
    width = max(len(first), len(second))
    first, second = ((*(a.terms.one for _ in range(width - len(dims))), *dims) for dims in (first, second))
    return tuple(a.terms.product(pair) for pair in zip(first, second, strict=True))


def inner(a: Analysis, call: Call) -> Value:
    """The last axes meet and are summed over, all others go through."""
    x, y = (a.dims(node) for node in call.node.args[:2])
    assert x
    assert y
    a.unify(x[-1], y[-1], "inner reduces over it")
    a.spaces.append((*x, *y[:-1]))
    return (*x[:-1], *y[:-1])


def tensordot(a: Analysis, call: Call) -> Value:
    """Several axes meet and are summed over, all others go through."""
    x, y = a.dims(call["self"]), a.dims(call["other"])
    mine, theirs = ([axis % len(dims) for axis in call[key]] for dims, key in ((x, "dims_self"), (y, "dims_other")))
    for i, j in zip(mine, theirs, strict=True):
        a.unify(x[i], y[j], "tensordot reduces over it")
    kept = tuple(term for j, term in enumerate(y) if j not in theirs)
    a.spaces.append((*x, *kept))
    return (*(term for i, term in enumerate(x) if i not in mine), *kept)


def chain(a: Analysis, call: Call) -> Value:
    """Matrices times each other."""
    first, *rest = (a.dims(node) for node in call["tensors"])
    for other in rest:
        first = matmul_dims(a, first, other)
    return first


def vecdot(a: Analysis, call: Call) -> Value:
    """Elementwise, then summed over one axis."""
    x = a.broadcast([a.dims(call["x"]), a.dims(call["y"])], "vecdot aligns them")
    axis = call["dim"] % len(x)
    a.spaces.append(x)
    return (*x[:axis], *x[axis + 1 :])


def bilinear(a: Analysis, call: Call) -> Value:
    """``x1[..., i] * weight[o, i, j] * x2[..., j]``, summed over both."""
    x, y, weight = (a.dims(call[key]) for key in ("input1", "input2", "weight"))
    batch = a.broadcast([x[:-1], y[:-1]], "bilinear aligns the batch")
    a.unify(x[-1], weight[1], "bilinear reduces over it")
    a.unify(y[-1], weight[2], "bilinear reduces over it")
    a.spaces.append((*batch, *weight))
    result = (*batch, weight[0])
    return a.broadcast([result, a.dims(call["bias"])], "an addition aligns them") if call["bias"] is not None else result


def cross(a: Analysis, call: Call) -> Value:
    """The three entries of an axis are told apart."""
    x = a.broadcast([a.dims(call["self"]), a.dims(call["other"])], "a cross product aligns them")
    axis = call["dim"] % len(x)
    a.pin((x[axis],), "a cross product tells its entries apart")
    a.mixed(x, (axis,))
    return x


def distances(a: Analysis, call: Call) -> Value:
    """``cdist``: every row of one with every row of the other, over their last axis."""
    x, y = a.dims(call["x1"]), a.dims(call["x2"])
    batch = a.broadcast([x[:-2], y[:-2]], "cdist aligns the batch")
    a.unify(x[-1], y[-1], "cdist reduces over it")
    a.spaces.append((*batch, x[-2], y[-2], x[-1]))
    return (*batch, x[-2], y[-2])


def pairwise(a: Analysis, call: Call) -> Value:
    """``pairwise_distance`` over the last axis."""
    x = a.broadcast([a.dims(call["x1"]), a.dims(call["x2"])], "a distance aligns them")
    a.spaces.append(x)
    return (*x[:-1], a.terms.one) if call["keepdim"] else x[:-1]


def spread(a: Analysis, call: Call) -> Value:
    """``diag_embed``: an axis becomes the diagonal of two of its kind."""
    dims = a.dims(call["self"])
    assert (call["offset"], call["dim1"] % (len(dims) + 1), call["dim2"] % (len(dims) + 1)) == (0, len(dims) - 1, len(dims))
    return (*dims, dims[-1])


def diagonal(a: Analysis, call: Call) -> Value:
    """``diag`` of a vector, a matrix with it on its diagonal; of a matrix, its diagonal, where both axes meet."""
    dims = a.dims(call["self"])
    assert call["diagonal"] == 0
    if len(dims) == 1:
        return (dims[0], dims[0])
    return _met(a, dims)


def trace(a: Analysis, call: Call) -> Value:
    """The sum of the diagonal."""
    _met(a, a.dims(call["self"]))
    return ()


def _met(a: Analysis, dims: Dims) -> Dims:
    rows, columns = dims
    assert rows.size == columns.size
    a.unify(rows, columns, "a diagonal compares its positions")
    return (rows,)


RULES: dict[str, Rule] = {
    **named("outer ger", outer),
    "kron": kron,
    "inner": inner,
    "tensordot": tensordot,
    "linalg_multi_dot": chain,
    "linalg_vecdot": vecdot,
    "bilinear": bilinear,
    "linalg_cross": cross,
    **named("cdist _cdist_forward", distances),
    "pairwise_distance": pairwise,
    "diag_embed": spread,
    "diag": diagonal,
    "trace": trace,
}
