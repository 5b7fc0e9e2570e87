"""What values of an ONNX file are called: planned weights and outputs as in the user's model, not as in the exported graph.

{"logits": y, "states": (a, b)}  ->  logits, states_0, states_1        y  ->  output        (y, z)  ->  output_0, output_1
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from nm_compiler.graph import tensor_outputs
from nm_compiler.sites.plan import Site


def name_after_parameters(model: Any, sites: Mapping[str, Site], origins: dict[str, str]) -> None:
    """Call planned weights in the file what the user's model calls them, where folding gave the program another name."""
    initializers = model.graph.initializers
    for old in list(initializers):
        known = origins.get(old, old)
        new = f"{sites[known].name}{old.removeprefix(known)}" if known in sites else old
        if new not in initializers:
            value = initializers.pop(old)
            value.name = new
            model.graph.register_initializer(value)
            origins[new] = known


def name_outputs(model: Any, names: Sequence[str]) -> None:
    """Call the outputs of the file ``names``, in order; one that is an input or a weight as well keeps its name."""
    outputs = list(model.graph.outputs)
    if len(outputs) != len(names):
        return
    used = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph.all_nodes():
        used.update(value.name for value in (*node.inputs, *node.outputs) if value is not None)
    for value, name in zip(outputs, names, strict=True):
        if name not in used and value.producer() is not None and value.name not in names:
            value.name = name
            used.add(name)


def output_names(gm: GraphModule, spec: pytree.TreeSpec) -> list[str]:
    """Of the outputs of ``gm`` that are tensors, by where ``spec`` puts them; none if a type hides what it holds."""
    leaves: Any = gm.graph.output_node().args[0]
    try:
        paths = dict(_paths(pytree.tree_unflatten([_Leaf(place) for place in range(len(leaves))], spec)))
    except Exception:  # a container of the user's that takes nothing but tensors
        return []
    tensors = tensor_outputs(gm)
    return [paths[at] for at in tensors] if all(at in paths for at in tensors) else []


class _Leaf:
    """The place of an output in the flat graph."""

    def __init__(self, place: int) -> None:
        self.place = place


def _paths(value: Any, path: str = "") -> Iterator[tuple[int, str]]:
    """(place, name) of all leaves: keys, fields and places, joined; an output that has none is called so."""
    if isinstance(value, _Leaf):
        name = re.sub(r"\W+", "_", path)
        yield value.place, name if name and not name[0].isdigit() else f"output_{name}".rstrip("_")
    for key, inner in _held(value):
        yield from _paths(inner, f"{path}_{key}" if path else str(key))


def _held(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name, None)) for each in dataclasses.fields(value)]
    return []
