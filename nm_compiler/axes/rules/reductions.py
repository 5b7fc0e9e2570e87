"""Reductions: the reduced axes go, and any order of them gives the same result."""

from __future__ import annotations

import operator

from nm_compiler.axes.analysis import Analysis, Call, Dims, Rule, Value, named


def reduce(a: Analysis, call: Call) -> Value:
    """Sums, means, norms, extremes over some axes, or over all; ``keepdim`` leaves axes of size 1."""
    x = a.dims(call.node.args[0])
    axes = _axes(call, len(x))
    result = _kept(a, x, axes, bool(call.get("keepdim")))
    a.mixed(x, axes)
    return (result, result) if isinstance(call.node.meta["val"], (tuple, list)) else result


def positions(a: Analysis, call: Call) -> Value:
    """``max(dim)``, ``argmax`` and the like tell where the entry was: the axis keeps its order if anybody asks."""
    x = a.dims(call.node.args[0])
    if not values_only(call):
        a.pin((x[axis] for axis in _axes(call, len(x))), f"{call.name} tells positions along it")
    return reduce(a, call)


def values_only(call: Call) -> bool:
    """Whether of ``(values, indices)`` only the values are used; ``median()`` returns nothing else."""
    if isinstance(call.node.meta["val"], (tuple, list)):
        return all(user.target is operator.getitem and user.args[1] == 0 for user in call.node.users)
    return call.name in ("median", "nanmedian")


def extreme(a: Analysis, call: Call) -> Value:
    """``max`` and ``min``: elementwise of two tensors, a reduction with positions, or one over all entries."""
    if call.get("other") is not None:
        return a.broadcast([a.dims(call["self"]), a.dims(call["other"])], f"{call.name} aligns them")
    return positions(a, call) if "dim" in call.args else reduce(a, call)


def cosine(a: Analysis, call: Call) -> Value:
    """``cosine_similarity`` along an axis."""
    x = a.broadcast([a.dims(call["x1"]), a.dims(call["x2"])], "cosine similarity aligns them")
    axis = call["dim"] % len(x)
    a.spaces.append(x)
    a.mixed(x, (axis,))
    return (*x[:axis], *x[axis + 1 :])


def _axes(call: Call, rank: int) -> tuple[int, ...]:
    given = call.get("dim")
    given = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    return tuple(axis % rank for axis in given) if rank else ()


def _kept(a: Analysis, dims: Dims, axes: tuple[int, ...], keepdim: bool) -> Dims:
    one = [a.terms.one] * keepdim
    return tuple(term for i, old in enumerate(dims) for term in (one if i in axes else [old]))


_REDUCTIONS = (
    "sum mean nansum nanmean amax amin var std var_mean std_mean prod all any logsumexp norm linalg_vector_norm "
    "count_nonzero frobenius_norm special_logsumexp aminmax"
)

RULES: dict[str, Rule] = {
    **named(_REDUCTIONS, reduce),
    **named("argmax argmin median nanmedian mode kthvalue", positions),
    **named("max min", extreme),
    "cosine_similarity": cosine,
}
