"""What inductor is told about our ops: backward weights of convolutions come first in a compiled backward pass.

    batch norm's sums, nm.backward_weight, batch norm's gradient, convolution_backward      in two kernels
    nm.backward_weight, ..., batch norm's sums and gradient, convolution_backward           in one

AOTAutograd puts a mask right before the convolution that reads it, which cuts what lies around it in two: twice the C++
to compile. Moved, it lives as long as it does in eager training. Masks of linears stay where they are needed: nothing
there is cut, and those weights are large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from nm_compiler.ops.weights import BACKWARD


class MasksFirst(CustomGraphPass):
    """Moves every backward weight that is made of inputs alone, for convolutions alone, to the front of the graph."""

    def __call__(self, graph: Graph) -> None:
        """Change ``graph``, which has been functionalised."""
        nodes = list(graph.nodes)
        front = next(node for node in nodes if node.op != "placeholder")
        for node in nodes:
            if node.target in BACKWARD and _is_for_convolutions(node) and node is not front:
                front.prepend(node)

    def uuid(self) -> Any:
        """What inductor's caches know it by."""
        return get_hash_for_files((__file__,))


def compiled(backend: Callable[..., Any], gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """What inductor makes of a graph. A pass of the user's own in that place of inductor's settings is left there, alone."""
    own = {} if config.post_grad_custom_post_pass is not None else {"post_grad_custom_post_pass": MasksFirst()}
    made: Callable[..., Any] = backend(gm, inputs, config_patches=own)
    return made


def _is_for_convolutions(node: Node) -> bool:
    readers = {user.target for user in node.users}
    return readers == {torch.ops.aten.convolution_backward.default} and all(
        given.op == "placeholder" for given in node.all_input_nodes
    )
