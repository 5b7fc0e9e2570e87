"""Normalisations and softmax: entries are scaled by what a whole run of them sums to, so any order of the run will do."""

from __future__ import annotations

from nm_compiler.axes.analysis import Analysis, Call, Rule, Value, named


def layer_norm(a: Analysis, call: Call) -> Value:
    """``layer_norm`` and ``rms_norm`` over the last axes, with a weight and a bias of their shape."""
    x = a.dims(call.node.args[0])
    run = len(call["normalized_shape"])
    a.mixed(x, range(len(x) - run, len(x)))
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            a.broadcast([x[-run:], a.dims(call[name])], f"{call.name} scales it")
    if call.name == "native_layer_norm":
        statistics = (*x[:-run], *(a.terms.one for _ in range(run)))
        return (x, statistics, statistics)
    return x


def batch_norm(a: Analysis, call: Call) -> Value:
    """``batch_norm`` and ``instance_norm``: one mean and scale a channel."""
    x = a.dims(call["input"])
    a.spaces.append(x[:2] if call.name == "instance_norm" else x[1:2])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            a.unify(x[1], a.dims(call[name])[0], f"{call.name} scales it")
    return x


def group_norm(a: Analysis, call: Call) -> Value:
    """One mean for all channels of a group and all positions; whole groups may change places."""
    x = a.dims(call["input"])
    groups = int(call["num_groups"])
    group, _ = a.regroup(x[1:2], (groups, x[1].size // groups), "group norm cuts across it")
    a.spaces.append((x[0], group))
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            a.unify(x[1], a.dims(call[name])[0], "group norm scales it")
    return x


def softmax(a: Analysis, call: Call) -> Value:
    """Softmax along an axis."""
    x = a.dims(call.node.args[0])
    a.mixed(x, (call["dim"] % max(len(x), 1),))
    return x


def cumulative(a: Analysis, call: Call) -> Value:
    """Running sums and the like: every entry needs those before it."""
    x = a.dims(call["self"])
    axis = call["dim"] % len(x)
    a.pin(x[axis : axis + 1], f"{call.name} runs along it")
    a.mixed(x, (axis,))
    return (x, x) if call.name in ("cummax", "cummin") else x


def normalize(a: Analysis, call: Call) -> Value:
    """``_weight_norm(v, g, dim)``: every row of v scaled to the length g."""
    v, g = a.dims(call["v"]), a.dims(call["g"])
    a.broadcast([v, g], "weight norm scales it")
    a.mixed(v, (i for i in range(len(v)) if i != call["dim"] % len(v)))
    return v


def prelu(a: Analysis, call: Call) -> Value:
    """A slope a channel, or one for all."""
    x, slope = a.dims(call["self"]), a.dims(call["weight"])
    if len(x) > 1 and slope:
        a.unify(x[1], slope[0], "prelu scales it")
    return x


RULES: dict[str, Rule] = {
    **named("layer_norm rms_norm native_layer_norm", layer_norm),
    **named("batch_norm instance_norm", batch_norm),
    "group_norm": group_norm,
    **named("softmax log_softmax _softmax _log_softmax _safe_softmax softmin", softmax),
    **named("cumsum cumprod logcumsumexp cummax cummin", cumulative),
    "_weight_norm": normalize,
    "prelu": prelu,
}
