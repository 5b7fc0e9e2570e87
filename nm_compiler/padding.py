"""Which entries of the values in a graph belong to tokens, and which to padding: followed from the mask that a batch brings.

    %attention_mask   [batch, tokens]          0 is padding
    %input_ids        [batch, tokens]          its entries are where the mask's are
    %embedding        [batch, tokens, width]   row by row, as linears, norms and attention (by query) are
    %transpose        [batch, width, tokens]   moved as the values are
    %sum over tokens  [batch, width]           of tokens, if one of them is
    %index_add        [tokens, width]          lost, until it is added to what is known

Calibration measures no padding that way; where it is lost, padding counts, and calibration says so.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from nm_compiler.graph import arguments_of
from nm_compiler.sites.equations import LINEAR, MATMULS, PRODUCTS
from nm_compiler.sites.uses import CONVS
from nm_compiler.sites.views import moves, reads_shape_only

aten = torch.ops.aten

_MASK = "attention_mask"  # as Hugging Face's tokenizers call it
_OTHER = "decoder_"  # inputs of a second sequence begin so, its mask as well
_AS_COPIED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default,
              aten.view_as.default: aten.reshape_as.default}  # fmt: skip
_JOINED = (aten.cat.default, aten.stack.default)
_BY_FIRST = (*MATMULS, aten.scaled_dot_product_attention.default)  # a row of the result for each of their first operand
_SECOND = (aten.embedding.default, aten.addmm.default, aten.baddbmm.default)  # whose data is their second operand


def padded(inputs: Mapping[str, Any], order: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The inputs that have padding, with where their tokens are, and those that may have some, where it is not known.

    inputs: of a call, by name; order: of the parameters of ``forward``. A mask has two axes, and belongs to the first input
    of its own shape, or else to the first that has one axis more.
    """
    known, lost = dict[str, Tensor](), list[str]()
    ranks = {name: rank for rank, name in enumerate(order)}
    names = sorted(inputs, key=lambda name: ranks.get(name, len(ranks)))
    for second in (False, True):
        mine = [name for name in names if name.startswith(_OTHER) is second and isinstance(inputs[name], Tensor)]
        mask = inputs.get(f"{_OTHER * second}{_MASK}")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask != 0).all()):
            continue
        fit = [name for name in mine if not name.endswith(_MASK) and inputs[name].shape[:2] == mask.shape]
        first = next((name for axes in (2, 3) for name in fit if inputs[name].ndim == axes), None)
        if first is None:
            lost += mine
        else:
            known[first] = mask != 0
    return known, lost


class Padding:
    """What is known of the values of one run of a graph; nothing of a run whose inputs have no padding.

    tokens: True where a value belongs to a token, of the value's shape; lost: nodes whose values may hold padding anywhere.
    sequences: of the call; fixed: the graph's constants.
    """

    def __init__(self, tokens: Mapping[Node, Tensor], lost: Sequence[Node], sequences: int, fixed: Collection[Node]) -> None:
        self.tokens: dict[Node, Any] = dict(tokens)
        self.lost = set(lost)
        self._sequences, self._fixed = sequences, fixed

    def hides_in(self, node: Node, value: Tensor) -> bool:
        """Whether some rows of ``value`` may be padding, and it is not known which. A row a sequence is none."""
        return node in self.lost and value.ndim > 0 and value.numel() > self._sequences * value.shape[-1]

    def follow(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what is known of ``result``, which ``node`` made of ``args`` and ``kwargs``."""
        read = node.all_input_nodes
        if node.op != "call_function" or not any(arg in self.tokens or arg in self.lost for arg in read):
            return
        if reads_shape_only(node, read[0]):
            return
        if node.target in _BY_FIRST and not (read[0] in self.tokens or read[0] in self.lost or read[0] in self._fixed):
            return  # a sequence without padding that looks at another
        found = self._made(node, args, kwargs, result) if any(arg in self.tokens for arg in read) else None
        if found is None:
            self.lost.add(node)
        else:
            self.tokens[node] = found

    def forget(self, nodes: Sequence[Node]) -> None:
        """Values that no op reads any more."""
        for node in nodes:
            self.tokens.pop(node, None)

    def _made(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        target: Any = node.target
        if target in _JOINED:
            parts = zip(node.all_input_nodes, args[0], strict=False)
            joined = [self.tokens.get(part, torch.ones_like(value, dtype=torch.bool)) for part, value in parts]
            return target(joined, *args[1:], **kwargs) if len(joined) == len(args[0]) else None
        if target is operator.getitem or moves(node):
            tokens = self.tokens.get(node.all_input_nodes[0])
            return None if tokens is None else _AS_COPIED.get(target, target)(tokens, *args[1:], **kwargs)
        leaves, spec = pytree.tree_flatten(result)
        made = [self._row_by_row(node, leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return None if any(each is None for each in made) else pytree.tree_unflatten(made, spec)

    def _row_by_row(self, node: Node, result: Tensor) -> Tensor | None:
        shape, read = result.shape, node.all_input_nodes
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            given = [self.tokens[arg] for arg in read if isinstance(self.tokens.get(arg), Tensor)]
            whole = [each.expand(shape) for each in given if _widens_to(each.shape, shape)]
            return reduce(torch.logical_and, whole) if whole else None
        tokens = self.tokens.get(read[1 if node.target in _SECOND and len(read) > 1 else 0])
        if not isinstance(tokens, Tensor):
            return None
        if node.target in CONVS:
            return tokens.any(1, keepdim=True).expand(shape) if tokens.shape[2:] == shape[2:] else None
        if tokens.shape == shape and (node.target not in PRODUCTS or node.target is LINEAR):
            return tokens
        if tokens.ndim == len(shape) and tokens.shape[:-1] == shape[:-1]:  # products, and sums over the last axis
            return tokens.any(-1, keepdim=True).expand(shape)
        if tokens.shape == shape[:-1]:  # embeddings
            return tokens.unsqueeze(-1).expand(shape)
        return _summed(node, tokens, shape)


def _widens_to(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a tensor of shape ``small`` can be expanded to ``large``."""
    return len(small) <= len(large) and all(
        ours in (1, theirs) for ours, theirs in zip(small[::-1], large[::-1], strict=False)
    )


def _summed(node: Node, tokens: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Of a sum or a mean over axes: it is of tokens where anything summed is."""
    axes = arguments_of(node).get("dim")
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, Sequence) or not all(isinstance(axis, int) for axis in axes):
        return None
    for axis in sorted((axis % tokens.ndim for axis in axes), reverse=True):
        tokens = tokens.any(axis, keepdim=tokens.ndim == len(shape))
    return tokens if tokens.shape == tuple(shape) else None
