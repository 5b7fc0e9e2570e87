"""What lies under ``torch.no_grad()``, or in a reentrant checkpoint, lies open in an exported graph.

    %y = wrap_with_set_grad_enabled(False, %body, %x)       %was = regions.switch_gradients(False)
    body:  %w = input                                ->     %y = aten.linear(%x, %w)
           %y = aten.linear(%x, %w)                         %now = regions.switch_gradients(%was)

Export hides such a region in a subgraph, where no pass would find its weights: a frozen backbone would stay dense. The
gradients are switched back to what the caller had, not to what they were at capture.

Export runs a reentrant checkpoint without gradients and does not switch them on again: everything from there on would never
train. So its function is captured as it is, as that of any other checkpoint is.

`nn.Transformer` compares masks with a causal one, for which export has no values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.fx import GraphModule, Node, has_side_effect

from nm_compiler.graph import Copies, getattr_path, inline

_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


@has_side_effect
def switch_gradients(enabled: bool) -> bool:
    """Record gradients from here on, or do not; returns what it was before."""
    was = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return was


def open_regions(exported: GraphModule) -> None:
    """Put the bodies of all regions, of one within another too, into the graph around them, also under autocast. In place."""
    graph = exported.graph
    for node in graph.find_nodes(op="call_function", target=_AUTOCAST):
        open_regions(getattr_path(exported, node.args[4].target))
    while regions := graph.find_nodes(op="call_function", target=_REGION):
        for node in regions:
            enabled, read, *given = node.args
            body = getattr_path(exported, read.target)
            with graph.inserting_before(node):
                was = graph.call_function(switch_gradients, (enabled,))
                outputs = _inlined(exported, body, given, node.name)
                now = graph.call_function(switch_gradients, (was,))
            was.meta["val"] = now.meta["val"] = None
            for user in list(node.users):  # an item of what the body returns
                user.replace_all_uses_with(outputs[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)


def without_switches(gm: GraphModule) -> GraphModule:
    """The graph for inference, which records no gradients anywhere. A pass."""
    for node in reversed(gm.graph.find_nodes(op="call_function", target=switch_gradients)):
        gm.graph.erase_node(node)
    return gm


@contextlib.contextmanager
def checkpoints_open() -> Iterator[None]:
    """Reentrant checkpoints call their function and nothing else."""

    class Open:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *inputs: Any) -> Any:
            return function(*inputs)

    with patch("torch.utils.checkpoint.CheckpointFunction", Open):
        yield


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """`nn.Transformer` does not look whether a mask is causal, for a faster kernel: it adds the mask, whatever it holds."""

    def hint(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    with patch("torch.nn.modules.transformer._detect_is_causal_mask", hint):
        yield


def _inlined(exported: GraphModule, body: GraphModule, given: Sequence[Any], name: str) -> Any:
    """Put the body of the region ``name`` to where nodes are inserted now. Returns what it returns, in nodes of the graph."""

    def copy(node: Node, copies: Copies) -> Node:
        new = exported.graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":  # a constant, or a region of its own
            new.target = f"{name}_{str(node.target).replace('.', '_')}"
            _set(exported, new.target, getattr_path(body, node.target))
        return new

    return inline(body, given, copy)


def _set(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
