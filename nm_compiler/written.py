"""State that a graph writes to: what forward() counts in a buffer, caches, running means.

    mark(gm)         no pass takes it for a constant (`nm_compiler.evaluate.is_constant`)
    carried(gm)      which of it a file would have to keep from call to call
    as_before(gm)    inside, the graph may run; afterwards the state is what it was
    own(gm)          it lies in memory of its own: what two models count is counted apart

Several tensors may show the same memory. If one of them is written to, so are all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from nm_compiler.graph import base_of, getattr_path
from nm_compiler.memory import memory_of

aten = torch.ops.aten
_NORMS = (aten.batch_norm.default, aten.instance_norm.default)
"""Of their running means their schemas say nothing; they write to them in training, which is their sixth argument."""


def mark(gm: GraphModule) -> GraphModule:
    """A pass: reads of what is written to say so in their ``meta``, before others make constants of what they find."""
    names = names_of(gm)
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target in names:
            node.meta["written"] = True
    return gm


def names_of(run: nn.Module) -> set[str]:
    """Names of the tensors that a graph writes to; none of what is no graph."""
    if not isinstance(run, GraphModule):
        return set()
    nodes = {base for node in run.graph.nodes for base in _bases(node)}
    direct = {str(node.target) for node in nodes if node.op == "get_attr"}
    if not direct:
        return direct
    places = {memory_of(getattr_path(run, name)) for name in direct} - {None}
    read = {str(node.target) for node in run.graph.find_nodes(op="get_attr")}
    return direct | {name for name in read if memory_of(getattr_path(run, name)) in places}


def carried(gm: GraphModule) -> set[str]:
    """Those of `names_of` that later outputs depend on: what is only counted, or written anew first, is none."""
    seen, stack = set[Node](), [gm.graph.output_node()]
    while stack:
        node = stack.pop()
        seen.add(node)
        read = node.all_input_nodes if node.target is not aten.copy_.default else node.all_input_nodes[1:]
        stack += [each for each in read if each not in seen]
    return names_of(gm) & {str(node.target) for node in seen if node.op == "get_attr"}


@contextlib.contextmanager
def as_before(run: nn.Module) -> Iterator[None]:
    """Run the graph inside and have nothing to show for it: what it writes to is put back."""
    held = [getattr_path(run, name) for name in names_of(run)]
    values = [(value, value.detach().clone()) for value in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, before in values:
                value.copy_(before)


def own(run: nn.Module) -> None:
    """Move what the graph writes to into memory that nobody else has; what showed the same memory still does."""
    copies: dict[int, torch.UntypedStorage] = {}
    for name in sorted(names_of(run)):
        path, _, leaf = name.rpartition(".")
        owner = run.get_submodule(path)
        owner._buffers[leaf] = _moved(owner._buffers[leaf], copies)


def _moved(value: Any, copies: dict[int, torch.UntypedStorage]) -> Tensor:
    place = memory_of(value)
    if place is None:
        return value.detach().clone()  # type: ignore[no-any-return]
    storage = copies.setdefault(place, value.untyped_storage().clone())
    made = torch.empty(0, dtype=value.dtype, device=value.device)
    return made.set_(storage, value.storage_offset(), value.size(), value.stride())


def _bases(node: Node) -> list[Node]:
    """Of what memory a node writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target in _NORMS:
        given: list[Any] = [*node.args[3:5]] if node.args[5] else []
    else:
        named = node.target._schema.arguments
        bound = dict(zip((each.name for each in named), node.args, strict=False)) | node.kwargs
        given = [bound.get(each.name) for each in named if each.alias_info is not None and each.alias_info.is_write]
    return [base for value in pytree.tree_leaves(given) if isinstance(base := base_of(value), Node)]
