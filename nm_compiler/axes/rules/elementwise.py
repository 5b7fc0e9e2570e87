"""Elementwise ops: entry i of every input meets entry i of the result, axes of size 1 meet them all.

Ops that torch tags as pointwise need no entry here; these are the ones it does not tag. In-place ops, writes into views
included, are the same rule: the terms of a view are those of what it views.
"""

from __future__ import annotations

from nm_compiler.axes.analysis import Analysis, Call, Dims, Rule, Value, named


def pointwise(a: Analysis, call: Call) -> Value:
    """Any op whose tensor inputs broadcast against each other."""
    inputs = [a.dims(node) for node in call.node.all_input_nodes]
    return a.broadcast(inputs, f"{call.name} aligns them")


def same(a: Analysis, call: Call) -> Value:
    """The first input's axes, whatever the others are: numbers, dtypes, a tensor of which only the dtype matters."""
    return a.dims(call.node.args[0])


def dropout(a: Analysis, call: Call) -> Value:
    """Zeros at random: no order in them. ``native_dropout`` returns the mask too."""
    dims = same(a, call)
    return (dims, dims) if call.name == "native_dropout" else dims


def write(a: Analysis, call: Call) -> Value:
    """``copy_(self, src)`` and ``fill_(self, value)``: the second broadcasts into the first."""
    target = a.dims(call.node.args[0])
    source = a.dims(call.node.args[1]) if len(call.node.args) > 1 else ()
    a.broadcast([target, source], f"{call.name} aligns them")
    return target


def sizes_of_other(a: Analysis, call: Call) -> Value:
    """``expand_as`` and ``broadcast_to``: an axis of size 1 is repeated, and all its entries are equal."""
    return stretched(a, a.dims(call.node.args[0]), a.shape(call.node))


def together(a: Analysis, call: Call) -> Value:
    """``broadcast_tensors``: all stretched to one shape, which does not make them meet."""
    vals = call.node.meta["val"]
    return tuple(stretched(a, a.dims(node), a.sizes(val)) for node, val in zip(call["tensors"], vals, strict=True))


def halves(a: Analysis, call: Call) -> Value:
    """``frexp``: mantissa and exponent."""
    dims = same(a, call)
    return (dims, dims)


def stretched(a: Analysis, dims: Dims, sizes: tuple[int, ...]) -> Dims:
    """``dims`` broadcast to ``sizes``: an axis that is repeated holds equal entries, so any order leaves it as it is."""
    result = []
    for i, size in enumerate(sizes):
        at = i - len(sizes) + len(dims)
        known = dims[at] if at >= 0 else a.terms.one
        result.append(known if known.size == size else a.terms.leaf(size))
    return tuple(result)


_POINTWISE = (
    "where masked_fill pow lerp addcmul addcdiv clamp clip _prelu_kernel rrelu gelu silu mish "
    "hardswish hardsigmoid hardtanh relu6 selu celu elu leaky_relu logsigmoid log_sigmoid softplus softshrink hardshrink "
    "threshold nan_to_num isclose logaddexp bitwise_and bitwise_or bitwise_xor bitwise_not logical_and logical_or "
    "logical_xor logical_not __and__ __or__ __xor__ __lshift__ __rshift__ remainder fmod floor_divide true_divide divide "
    "multiply subtract rsub polar complex square special_expit relu sigmoid tanh "
    "__iand__ __ior__ xlogy copysign hypot atan2 arctan2 maximum minimum fmax fmin eq ne lt le gt ge "
    "bernoulli normal greater less not_equal greater_equal less_equal float_power ldexp nextafter"
)
_SAME = (
    "clone detach contiguous alias to _to_copy type_as positive lift_fresh_copy lift_fresh lift resolve_conj resolve_neg "
    "requires_grad retain_grad feature_dropout feature_alpha_dropout alpha_dropout dropout zero detach_copy float double half "
    "bfloat16 uniform real imag exponential _autocast_to_reduced_precision _autocast_to_full_precision "
    "fake_quantize_per_tensor_affine random cauchy log_normal geometric"
)

RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    **named(_POINTWISE, pointwise),
    **named(_SAME, same),
    "native_dropout": dropout,
    "copy": write,
    "fill": write,
    "expand": sizes_of_other,
    "expand_as": sizes_of_other,
    "broadcast_to": sizes_of_other,
    "expand_copy": sizes_of_other,
    "broadcast_tensors": together,
    "frexp": halves,
}
