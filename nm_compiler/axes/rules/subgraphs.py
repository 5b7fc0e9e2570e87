"""Higher-order ops that run a subgraph once: its placeholders are the op's inputs."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from nm_compiler.axes.analysis import Analysis, Call, Rule, Value, named
from nm_compiler.graph import getattr_path


def once(a: Analysis, call: Call) -> Value:
    """``no_grad`` and ``autocast`` regions, activation checkpoints: the subgraph's own rules apply."""
    arguments = call.node.args
    at = next(i for i, arg in enumerate(arguments) if isinstance(arg, Node) and arg.op == "get_attr" and a.value(arg) is None)
    holder = call.node.graph.owning_module
    subgraph = getattr_path(holder, arguments[at].target)  # type: ignore[union-attr]
    assert isinstance(subgraph, GraphModule)
    return a.run(subgraph, [a.value(arg) for arg in arguments[at + 1 :]])


_ONCE = "wrap_with_set_grad_enabled wrap_with_autocast tag_activation_checkpoint wrap_activation_checkpoint wrap"

RULES: dict[str, Rule] = named(_ONCE, once)
