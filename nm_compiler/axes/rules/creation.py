"""Ops that make tensors. Equal or random entries have no order; counted ones (``arange``) keep theirs."""

from __future__ import annotations

from nm_compiler.axes.analysis import Analysis, Call, Rule, Value, named


def uniform(a: Analysis, call: Call) -> Value:
    """All entries equal, or drawn alike: every order leaves the result as it is."""
    for node in call.node.all_input_nodes:  # new_full and friends may take a fill value that is a tensor of no axes
        assert call.name.endswith("_like") or call.name.startswith("new_") or not a.dims(node)
    return a.fresh(call.node.meta["val"])


def counted(a: Analysis, call: Call) -> Value:
    """Entries that tell where they are."""
    return a.fresh(call.node.meta["val"], pinned=f"{call.name} counts along it")


def triangle(a: Analysis, call: Call) -> Value:
    """``tril`` and ``triu`` compare the last two axes."""
    dims = a.dims(call.node.args[0])
    a.pin(dims[-2:], f"{call.name} compares its positions")
    a.mixed(dims, (len(dims) - 2, len(dims) - 1))
    return dims


_UNIFORM = (
    "zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like "
    "rand randn rand_like randn_like randint randint_like new_empty_strided empty_strided empty_permuted scalar_tensor"
)
_COUNTED = "arange linspace logspace eye randperm tril_indices triu_indices hann_window hamming_window tensor"

RULES: dict[str, Rule] = {
    **named(_UNIFORM, uniform),
    **named(_COUNTED, counted),
    "tril": triangle,
    "triu": triangle,
}
