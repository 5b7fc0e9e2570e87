"""Products: a reduced axis of one input meets the reduced axis of the other, all others go through."""

from __future__ import annotations

from collections.abc import Iterable

from nm_compiler.axes.analysis import Analysis, Call, Dims, Rule, Value, named


def linear(a: Analysis, call: Call) -> Value:
    """``x[..., in] @ weight[out, in].T + bias[out]``."""
    x, weight = a.dims(call["input"]), a.dims(call["weight"])
    a.unify(x[-1], weight[-1], "linear reduces over it")
    a.spaces.append((*x, *weight[:-1]))
    result = (*x[:-1], *weight[:-1])
    return _plus(a, result, call["bias"])


def _plus(a: Analysis, dims: Dims, other: object) -> Dims:
    return a.broadcast([dims, a.dims(other)], "an addition aligns them") if other is not None else dims


def matmul_dims(a: Analysis, left: Dims, right: Dims) -> Dims:
    """``left @ right`` as torch.matmul broadcasts it."""
    rows = left if len(left) > 1 else (a.terms.one, *left)
    columns = right if len(right) > 1 else (*right, a.terms.one)
    batch = a.broadcast([rows[:-2], columns[:-2]], "matmul aligns the batch")
    a.unify(rows[-1], columns[-2], "matmul reduces over it")
    a.spaces.append((*batch, rows[-2], rows[-1], columns[-1]))
    return (*batch, *rows[-2:-1][: len(left) - 1], *columns[-1:][: len(right) - 1])


def matmul(a: Analysis, call: Call) -> Value:
    """``matmul``, ``mm``, ``bmm``, ``mv``, ``dot``."""
    left, right = (a.dims(node) for node in call.node.args[:2])
    return matmul_dims(a, left, right)


def addmm(a: Analysis, call: Call) -> Value:
    """``input + left @ right``, also batched."""
    added, left, right = (a.dims(node) for node in call.node.args[:3])
    return a.broadcast([matmul_dims(a, left, right), added], "an addition aligns them")


def einsum(a: Analysis, call: Call) -> Value:
    """Every letter is an axis; letters that the result lacks are summed over."""
    equation = call["equation"].replace(" ", "")
    tensors = [a.dims(node) for node in call["tensors"]]
    terms, arrow, out = equation.partition("->")
    inputs = terms.split(",")
    width = max(len(dims) - len(text.replace("...", "")) for text, dims in zip(inputs, tensors, strict=True))
    hidden = "".join(chr(0x2460 + i) for i in range(width))  # letters for the axes that ... stands for
    if not arrow:
        letters = terms.replace(",", "").replace("...", "")
        out = ("..." if "..." in terms else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    met: dict[str, Dims] = {}
    for text, dims in zip(inputs, tensors, strict=True):
        missing = len(dims) - len(text.replace("...", ""))
        for letter, term in zip(text.replace("...", hidden[width - missing :]), dims, strict=True):
            met[letter] = (*met.get(letter, ()), term)
    axes = {letter: a.broadcast([(term,) for term in found], "einsum aligns them")[0] for letter, found in met.items()}
    a.spaces.append(tuple(axes.values()))
    return tuple(axes[letter] for letter in out.replace("...", hidden))


def attention(a: Analysis, call: Call) -> Value:
    """``softmax(q[..., n, d] @ k[..., m, d].T + mask[..., n, m]) @ v[..., m, e]``; in GQA one head of k serves several."""
    query, key, value = (a.dims(call[name]) for name in ("query", "key", "value"))
    if call.get("enable_gqa"):
        key, value = (_with_heads(a, query, dims) for dims in (key, value))
    *_, n, d = query
    *_, m, _ = key
    batch = a.broadcast([query[:-2], key[:-2], value[:-2]], "attention aligns batch and heads")
    a.unify(d, key[-1], "attention reduces over it")
    a.unify(m, value[-2], "attention reduces over it")
    if call.get("attn_mask") is not None:
        a.broadcast([(*batch, n, m), a.dims(call["attn_mask"])], "attention aligns the mask")
    if call.get("is_causal"):
        a.pin((n, m), "causal attention compares its positions")
    a.spaces += [(*batch, n, m, d), (*batch, n, m, value[-1]), (*batch, n)]
    return (*batch, n, value[-1])


def _with_heads(a: Analysis, query: Dims, dims: Dims) -> Dims:
    """Heads of k or v, each standing for several heads of q next to each other."""
    heads, many = dims[-3], query[-3]
    if heads.size == many.size:
        return dims
    repeated = a.terms.product((heads, a.terms.leaf(many.size // heads.size)))
    return (*dims[:-3], repeated, *dims[-2:])


def grouped(a: Analysis, call: Call) -> Value:
    """Grouped matmul of a mixture of experts: rows of x, sorted by expert, meet that expert's ``[in, out]`` matrix."""
    x, weight, *rest = (a.dims(node) for node in call.node.all_input_nodes)
    a.pin((x[0], weight[0], *(term for dims in rest for term in dims)), "rows are assigned to experts")
    a.unify(x[-1], weight[-2], "a grouped matmul reduces over it")
    a.spaces += [(x[0], x[1], weight[2]), (weight[1], weight[2])]  # rows do not say their expert: one order for all
    return (x[0], weight[-1])


def convolution(a: Analysis, call: Call) -> Value:
    """Input channels meet, output channels go through, positions are pinned. Groups are an axis of their own.

    Where the kernel sees one position at a time and skips none, positions go through as well.
    """
    x, weight = a.dims(call["input"]), a.dims(call["weight"])
    transposed = "transpose" in call.name or bool(call.get("transposed"))
    groups = int(call["groups"])
    space = len(weight) - 2
    batch, channels, positions = x[: -space - 1], x[-space - 1], x[-space:]
    why = f"{call.name} slides over it"
    through = [_is_pointwise(call, k) and weight[2 + k].size == 1 for k in range(space)]
    a.pin((*(term for term, free in zip(positions, through, strict=True) if not free), *weight[2:]), why)
    rows, columns = weight[0], weight[1]
    if groups > 1:
        g, rows = a.regroup((rows,), (groups, rows.size // groups), "conv groups cut across it")
        g2, inner = a.regroup((channels,), (groups, channels.size // groups), "conv groups cut across it")
        a.unify(g, g2, "conv groups meet")
    else:
        g, inner = a.terms.one, channels
    reduced, out = (rows, columns) if transposed else (columns, rows)
    a.unify(inner, reduced, "a convolution reduces over it")
    a.spaces += [
        (*batch, *(term for term, free in zip(positions, through, strict=True) if free), g, inner, out),
        (g, rows, columns),
    ]
    result_channels = a.terms.product((g, out))
    if call.get("bias") is not None:
        a.unify(result_channels, a.dims(call["bias"])[0], "an addition aligns them")
    slid = _pinned(a, a.shape(call.node)[-space:], why)
    return (*batch, result_channels, *(x if free else y for x, y, free in zip(positions, slid, through, strict=True)))


def _is_pointwise(call: Call, axis: int) -> bool:
    """No stride and no padding along a position axis: with a kernel of one, entry i of the result comes from entry i alone."""
    stride, padding, more = (_along(call.get(name), axis) for name in ("stride", "padding", "output_padding"))
    return stride in (None, 1) and padding in (None, 0, "valid", "same") and more in (None, 0)


def _along(option: object, axis: int) -> object:
    """An option of a convolution, given once or for each position axis; ``[]`` is the default."""
    if not isinstance(option, (list, tuple)):
        return option
    return option[axis % len(option)] if option else None


def recurrent(a: Analysis, call: Call) -> Value:
    """``lstm``, ``gru``, ``rnn``: the first layer reduces over the features of x; gates and states keep their order."""
    if call.get("input") is None:  # a packed sequence
        return a.pin_all(call.node, f"{call.name} runs over packed steps")
    x, params = a.dims(call["input"]), [a.dims(node) for node in call["params"]]
    why = f"{call.name} runs along it"
    directions = 2 if call["bidirectional"] else 1
    each = len(params) // (int(call["num_layers"]) * directions)
    first = [params[each * k] for k in range(directions)]
    for weight in first:
        a.unify(x[-1], weight[1], f"{call.name} reduces over it")
        a.spaces.append((*x, weight[0]))
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    others = [dims for dims in params if not any(dims is weight for weight in first)]
    a.pin((*x[:-1], *(weight[0] for weight in first)), why)
    a.pin((term for dims in (*others, *map(a.dims, states)) for term in dims), why)
    return a.fresh(call.node.meta["val"], why)


def _pinned(a: Analysis, sizes: Iterable[int], why: str) -> Dims:
    return tuple(a.terms.one if size == 1 else a.terms.leaf(size, why) for size in sizes)


_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"

RULES: dict[str, Rule] = {
    "linear": linear,
    **named("matmul mm bmm mv dot linalg_matmul", matmul),
    **named("addmm baddbmm addmv", addmm),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **named("_grouped_mm transformers.grouped_mm_fallback", grouped),
    **named(_CONVOLUTIONS, convolution),
    **named("lstm gru rnn_tanh rnn_relu", recurrent),
}
