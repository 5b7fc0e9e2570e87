"""Write the masks into the weights: zeros on disk, a plain aten graph.

    before                                            after
    %w = self.fc.weight                               %w = self.fc.weight                 # now exactly N:M
    %v = nm.score_weight(%w, %s, %l, ...)             %y = aten.linear(%x, %w, %b)
    %y = aten.linear(%x, %v, %b)
    %z = nm.conv(%y, %v2, %u2, %c, [1, 1], ...)       %z = aten.conv2d(%y, %w2, %c, [1, 1], ...)

A node that stands for a weight depends on parameters and constants alone, so its value is computed here and copied
into the parameter in place. `nm.linear` and its kin become the products they compute in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import value_of
from nm_compiler.rewrite import is_masked, read_behind, replace
from nm_compiler.runtime.cusparselt.training import cslt_train_linear

aten, nm = torch.ops.aten, torch.ops.nm
_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


class Folding:
    """Every masked parameter of some graphs of one model becomes what the first of them multiplies with, one at a time.

    Where it was interrupted it goes on: a value that may have been written already is written again, and not made again, as a
    method need not give the same value for a weight that it has frozen.
    """

    def __init__(self, programs: Iterable[GraphModule]) -> None:
        found = {id(value_of(gm, read_behind(node))): (gm, node) for gm in [*programs][::-1] for node in _masked(gm)[::-1]}
        self._left = list(found.values())
        self._value: tuple[Node, Tensor] | None = None  # of the last of those that are left

    @torch.no_grad()
    def go_on(self) -> None:
        """Write all that is left."""
        while self._left:
            gm, node = self._left[-1]
            if self._value is None or self._value[0] is not node:
                self._value = None
                self._value = node, value_of(gm, node)
            value_of(gm, read_behind(node)).copy_(self._value[1])
            self._left.pop()
        self._value = None


def freeze_masks(gm: GraphModule, *, apart: bool = False) -> GraphModule:
    """Fold every masked weight into its parameter, in place on the model that the graph is bound to.

    apart: the graph alone; a `Folding` writes to the parameters.
    """
    if not apart:
        Folding([gm]).go_on()
    for node in _masked(gm):
        node.replace_all_uses_with(read_behind(node))
    for node in list(gm.graph.nodes):
        plain = _plain(node)
        if plain is not None:
            with gm.graph.inserting_before(node):
                replace(node, gm.graph.call_function(*plain))
    return gm


def _masked(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if is_masked(node)]


def _plain(node: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The op and the arguments with which a product of two weights computes its output; None for any other node."""
    args: Any = node.args
    match node.target:
        case nm.linear.default:
            data, weight, _, bias = args
            return aten.linear.default, (data, weight, bias)
        case cslt_train_linear._opoverload:
            data, weight, _, _, bias, *_ = args
            return aten.linear.default, (data, weight, bias)
        case nm.conv.default:
            data, weight, _, bias, *geometry = args
            return _CONV[len(geometry[0])], (data, weight, bias, *geometry)
        case nm.einsum.default:
            data, weight, _, equation = args
            return aten.einsum.default, (equation, [data, weight])
        case nm.grouped_mm.default:
            data, weight, _, offsets, native = args
            op = aten._grouped_mm.default if native else torch.ops.transformers.grouped_mm_fallback.default
            return op, (data, weight, offsets)
    return None
