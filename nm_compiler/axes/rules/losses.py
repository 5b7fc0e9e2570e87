"""Losses: elementwise, then kept, or summed over everything."""

from __future__ import annotations

from nm_compiler.axes.analysis import Analysis, Call, Dims, Rule, Value, named


def elementwise(a: Analysis, call: Call) -> Value:
    """Losses of aligned entries, weighted or not."""
    x = a.broadcast([a.dims(node) for node in call.node.all_input_nodes], f"{call.name} aligns them")
    a.spaces.append(x)
    return _reduced(a, call, x)


def classes(a: Analysis, call: Call) -> Value:
    """``cross_entropy`` and ``nll_loss``: classes are told by number, or by one probability each."""
    x, target = a.dims(call["self"]), a.dims(call["target"])
    axis = min(len(x) - 1, 1)
    others = (*x[:axis], *x[axis + 1 :])
    if len(target) == len(x):
        a.broadcast([x, target], f"{call.name} aligns them")
    else:
        a.pin((x[axis],), "classes are told by number")
        a.broadcast([others, target], f"{call.name} aligns them")
    if call.get("weight") is not None:
        a.unify(x[axis], a.dims(call["weight"])[0], f"{call.name} aligns its weights")
    a.mixed(x, (axis,))
    return _reduced(a, call, others)


def _reduced(a: Analysis, call: Call, dims: Dims) -> Dims:
    return dims if len(a.shape(call.node)) == len(dims) else ()


_ELEMENTWISE = (
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
    "soft_margin_loss poisson_nll_loss hinge_embedding_loss"
)

RULES: dict[str, Rule] = {
    **named(_ELEMENTWISE, elementwise),
    **named("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d", classes),
}
