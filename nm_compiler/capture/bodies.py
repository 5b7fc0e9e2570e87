"""Ops that take a subgraph: their bodies read the model's weights themselves, so that passes find them there.

    %w = self.fc.weight                                          %x = input
    %x = input                                        ->         %y = bodies.checkpointed(%body, %x)
    %y = tag_activation_checkpoint(%body, %x, %w)                body:  %w = self.fc.weight
    body:  %w = input                                                   ...

A body is then a graph over the model like any other, and each pass runs on it as on the graph around it. Passing a masked
weight into the body instead would hide the product from the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from nm_compiler.capture.binding import bind, flat_copy, is_state
from nm_compiler.graph import body_of, getattr_path, show_graph, tidy

_higher = torch.ops.higher_order


CONTEXT = "_checkpoint_context_fn"  # torch's own key: the body's meta has the context_fn= of a selective checkpoint


def checkpointed(body: GraphModule, *inputs: Any, **options: Any) -> Any:
    """Run ``body`` and recompute it in the backward pass, with the same random numbers."""
    options.pop("use_reentrant", None)
    if CONTEXT in body.meta:  # not an argument of the node: no graph can print a function
        options["context_fn"] = body.meta[CONTEXT]
    result = checkpoint(body, *inputs, use_reentrant=False, **options)
    return result


def branch(condition: Any, yes: Callable[..., Any], no: Callable[..., Any], operands: Any) -> Any:
    """``torch.cond``, decided now: gradients reach whatever the taken branch reads."""
    taken = yes if bool(condition) else no
    return taken(*operands)


def autocast(device: str, dtype: Any, enabled: bool, cache: bool | None, body: Callable[..., Any], *inputs: Any) -> Any:
    """Run ``body`` as under ``with torch.autocast(...)`` in the model's own forward()."""
    with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
        return body(*inputs)


Hosts = Mapping[Any, Callable[..., Any]]
HOSTS: Hosts = {_higher.tag_activation_checkpoint: checkpointed, _higher.cond: branch}
EXPORTED: Hosts = {_higher.wrap_with_autocast: autocast}  # what a graph of torch.export has


def open_bodies(gm: GraphModule, model: nn.Module, hosts: Hosts = HOSTS) -> None:
    """Bind the bodies of ``hosts`` to ``model`` and move the reads of its state into them. In place on ``gm``.

    A region of autocast that multiplies no weight of the model stays as it is.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in hosts:
            continue
        bodies = {arg: body for arg in node.all_input_nodes if (body := body_of(arg)) is not None}
        head, given = _parts(node)
        inside = [index for index, arg in enumerate(given) if isinstance(arg, Node) and _reads_state(arg, model)]
        if node.target is _higher.wrap_with_autocast and not any(_is_weight(given[index]) for index in inside):
            continue
        for read, body in bodies.items():
            inner = bound(body, {index: str(given[index].target) for index in inside}, model, hosts)
            inner.meta.update(body.meta)
            gm.__dict__["extras"][str(read.target)] = gm.__dict__[str(read.target)] = inner
        left = tuple(arg for index, arg in enumerate(given) if index not in inside)
        node.args = (*head, left) if node.target is _higher.cond else (*head, *left)
        node.target = hosts[node.target]


def programs(gm: GraphModule) -> Iterator[GraphModule]:
    """The graph and, in turn, the bodies in it that are graphs over the model too."""
    yield gm
    for value in gm.__dict__.get("extras", {}).values():
        if is_body(value):
            yield from programs(value)


def names_read(gm: GraphModule) -> set[str]:
    """What the graph and the bodies in it read from the model, by name."""
    return {str(node.target) for each in programs(gm) for node in each.graph.find_nodes(op="get_attr")}


def program_text(gm: GraphModule) -> str:
    """The graph and the bodies in it, as `show` prints them."""
    first, *bodies = (show_graph(each) for each in programs(gm))
    return "\n\n".join([first, *(f"# a body of it\n{body}" for body in bodies)])


def is_body(value: Any) -> bool:
    """Whether a constant of a graph is a body bound to the model."""
    return isinstance(value, GraphModule) and "extras" in value.__dict__


def _parts(node: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments up to the bodies, and what the bodies are given."""
    if node.target is _higher.cond:
        return node.args[:3], tuple(node.args[3])  # type: ignore[arg-type]
    first = 5 if node.target is _higher.wrap_with_autocast else 1
    return node.args[:first], node.args[first:]


def bound(program: GraphModule, reads: Mapping[int, str], model: nn.Module, hosts: Hosts = HOSTS) -> GraphModule:
    """A copy of ``program`` over ``model``, bodies in it as well.

    reads: which of its inputs become reads of the model's state, by place, and of what; the others stay, in their order.
    """
    graph = flat_copy(program.graph)
    placeholders = graph.find_nodes(op="placeholder")
    for index, name in reads.items():
        node = placeholders[index]
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", name, name=name.replace(".", "_"))
        read.meta = {"val": _fake_like(node, getattr_path(model, name))}
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in ("val", "stack_trace")}
    names = set(reads.values())
    held = [str(node.target) for node in graph.nodes if node.op == "get_attr" and node.target not in names]
    gm = bind(graph, model, {name: getattr_path(program, name) for name in held})
    open_bodies(gm, model, hosts)
    tidy(gm)
    return gm


def _fake_like(node: Node, value: Tensor) -> Any:
    """The input's own fake value, which shapes of later nodes are computed from."""
    return node.meta["val"] if isinstance(node.meta.get("val"), Tensor) else value.detach().to("meta")


def _reads_state(node: Node, model: nn.Module) -> bool:
    return node.op == "get_attr" and is_state(model, str(node.target))


def _is_weight(read: Node) -> bool:
    value = getattr_path(read.graph.owning_module, read.target)
    return isinstance(value, nn.Parameter) and value.ndim > 1
