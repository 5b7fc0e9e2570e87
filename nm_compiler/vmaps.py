"""A ``torch.vmap`` in a fragment of TorchDynamo becomes what it computes, in aten.

    %l = vmap_increment_nesting(4, error)
    %b = add_batch_dim(%x, 0, %l)                        %y = aten.mul(%x, %u)
    %c = mul(%b, %u)                             ->
    %y = remove_batch_dim(%c, %l, 4, 0)
    %d = vmap_decrement_nesting()

A tracer that records before autograd does not see into batched tensors, and would keep their values as constants. So each
vmap, from its first node to its last, is traced by itself below autograd beforehand, and put back as plain ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch._functorch import predispatch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from nm_compiler.capture import flat_copy
from nm_compiler.graph import getattr_path


def without_vmaps(fragment: GraphModule) -> GraphModule:
    """The fragment itself where it has no vmap, else a copy without. Call it inside the fragment's fake mode.

    The inputs of a vmap need ``meta["example_value"]``, which TorchDynamo gives every node.
    """
    if not any(node.target is predispatch._vmap_increment_nesting for node in fragment.graph.nodes):
        return fragment
    gm = GraphModule(fragment, flat_copy(fragment.graph))
    for region in list(_regions(gm.graph)):
        _replace(gm, region)
    gm.graph.lint()
    gm.recompile()
    return gm


def _regions(graph: Graph) -> Iterator[list[Node]]:
    """The nodes of every outermost vmap."""
    region: list[Node] = []
    depth = 0
    for node in graph.nodes:
        depth += node.target is predispatch._vmap_increment_nesting
        if depth:
            region.append(node)
        depth -= node.target is predispatch._vmap_decrement_nesting
        if region and not depth:
            yield region
            region = []


def _replace(gm: GraphModule, region: Sequence[Node]) -> None:
    inside = set(region)
    given = list(dict.fromkeys(arg for node in region for arg in node.all_input_nodes if arg not in inside))
    results = [node for node in region if any(user not in inside for user in node.users)]
    alone = Graph()
    copies = {node: alone.placeholder(node.name) for node in given}
    for node in region:
        copies[node] = alone.node_copy(node, copies.__getitem__)
    alone.output(tuple(copies[node] for node in results))
    examples = [_example(gm, node) for node in given]
    traced = make_fx(GraphModule(gm, alone), _allow_non_fake_inputs=True)(*examples)
    inner: dict[Node, Any] = dict(zip((node for node in traced.graph.nodes if node.op == "placeholder"), given, strict=True))
    with gm.graph.inserting_before(region[0]):
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                name = f"{region[0].name}_{node.target}".replace(".", "_")
                setattr(gm, name, getattr_path(traced, node.target))
                inner[node] = gm.graph.get_attr(name)
            elif node.op == "call_function":
                inner[node] = gm.graph.node_copy(node, inner.__getitem__)
    outputs: Any = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    for node, value in zip(results, outputs, strict=True):
        node.replace_all_uses_with(inner[value], delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _example(gm: GraphModule, node: Node) -> Any:
    value = node.meta.get("example_value")
    return getattr_path(gm, node.target) if value is None and node.op == "get_attr" else value
