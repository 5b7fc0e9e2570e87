"""Make the mask ops of consecutive weights one call, for plain eager execution, where each call costs more than its kernel.

    before                                      after
    %w = self.fc1.weight                        %w = self.fc1.weight
    %k = nm.srste_weight(%w, 2, 4, 1, d)        %u = self.fc2.weight
    %y = aten.linear(%x, %k)                    %b = together(nm.srste_weight, [[%w, 2, 4, 1, d], [%u, 2, 4, 1, d]])
    %u = self.fc2.weight                        %k = operator.getitem(%b, 0)
    %l = nm.srste_weight(%u, 2, 4, 1, d)        %l = operator.getitem(%b, 1)
    %z = aten.linear(%y, %l)                    %y = aten.linear(%x, %k)
                                                %z = aten.linear(%y, %l)

Not a step of a pipeline: `nm_compiler.capture.exported` runs a graph so gathered, and shows and hands on the one before.

Safe because the ops are functions of parameters and state alone, which no node between the first and the last of a chunk
writes; nothing between them switches gradients or autocast either. A weight that is read more than once stays alone, so that
its gradients are added in the same order. Chunks are small against a model: its first gradients are there before the last
are computed, and what waits in memory is a chunk at most.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from nm_compiler.graph import base_of, getattr_path, written_args
from nm_compiler.ops.together import KINDS, together
from nm_compiler.rewrite import replace

CHUNK = 6_000_000  # numbers: 24 MB in f32, about a bucket of DistributedDataParallel


def gather_masks(gm: GraphModule, *, limit: int = CHUNK) -> GraphModule:
    """One call for mask ops of a kind whose weights have ``limit`` numbers at most. Nested graphs are left alone."""
    for target in KINDS:
        for chunk in _chunks(gm, target, limit):
            if len(chunk) > 1:
                _merge(gm.graph, target, chunk)
    return gm


def _chunks(gm: GraphModule, target: Any, limit: int) -> list[list[Node]]:
    """The nodes that can be one call, placed where the first of them is."""
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    alone = set(_read_often(gm)) if KINDS[target].keeps else set()
    chunks: list[list[Node]] = [[]]
    left = limit
    for node in gm.graph.nodes:
        if _is_barrier(node):
            chunks.append([])
        if node.target is not target or node.args[0] in alone or not isinstance(node.args[0], Node) or node.kwargs:
            continue
        if KINDS[target].keeps and node.args[0].op != "get_attr":
            continue
        chunk, size = chunks[-1], _size(gm, node)
        there = not chunk or all(each.op == "get_attr" or place[each] < place[chunk[0]] for each in node.all_input_nodes)
        if chunk and there and size <= left:
            chunk.append(node)
            left -= size
        else:
            chunks.append([node])
            left = limit - size
    return chunks


def _read_often(gm: GraphModule) -> Iterator[Node]:
    """Reads of values that other nodes read too, under this name or another."""
    reads = [node for node in gm.graph.nodes if node.op == "get_attr"]
    values = {node: id(getattr_path(gm, node.target)) for node in reads}
    users = Counter(value for node, value in values.items() for _ in node.users)
    return (node for node in reads if users[values[node]] > 1)


def _size(gm: GraphModule, node: Node) -> int:
    if node.target is torch.ops.nm.unpack_mask.default:
        return prod(node.args[1])  # type: ignore[arg-type]
    source: Any = node
    while source.op != "get_attr":
        source = source.args[0].args[1][source.args[1]][0] if source.target is operator.getitem else source.args[0]
    return int(getattr_path(gm, source.target).numel())


def _is_barrier(node: Node) -> bool:
    """Whether ops that read weights must not pass this node."""
    if node.op != "call_function" or node.target is together:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", None) not in ("_operator", "operator", "builtins", "math")
    written = written_args(node)
    return any(map(_is_state, written)) or (node.target._schema.is_mutable and (not written or bool(node.kwargs)))


def _is_state(written: Any) -> bool:
    """Whether what is written is a parameter or state of at least two axes, a view of such, or nothing known."""
    base = base_of(written)
    if not isinstance(base, Node):
        return True
    if base.op == "get_attr":
        return bool(getattr_path(base.graph.owning_module, base.target).ndim > 1)
    if not isinstance(base.target, torch._ops.OpOverload):
        return base.op != "placeholder"
    returned = base.target._schema.returns
    return base.target in KINDS or not returned or returned[0].alias_info is not None


def _merge(graph: Graph, target: Any, chunk: list[Node]) -> None:
    first, known = chunk[0], dict[Any, Node]()

    def here(node: Node) -> Node:
        """What a call reads, before the first of them."""
        if node.op != "get_attr":
            return node
        if node.target not in known:
            known[node.target] = graph.create_node("get_attr", node.target)
            known[node.target].meta = dict(node.meta)
        return known[node.target]

    with graph.inserting_before(first):
        calls = [list(map_arg(node.args, here)) for node in chunk]
        every = graph.call_function(together, (target, calls))
        items = [graph.call_function(operator.getitem, (every, index)) for index in range(len(chunk))]
    if all("val" in node.meta for node in chunk):
        every.meta["val"] = [node.meta["val"] for node in chunk]
    for node, item in zip(chunk, items, strict=True):
        replace(node, item)
