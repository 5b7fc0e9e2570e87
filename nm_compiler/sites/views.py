"""Follow a weight through views and other steps that keep its zeros, and know which weight lies where.

    %w = self.in_proj_weight              [48, 16]   strides (16, 1), from 0
    %c = aten.chunk(%w, 3)
    %k = operator.getitem(%c, 1)          [16, 16]   strides (16, 1), from 256: rows 16 to 31
    %t = aten.transpose.int(%k, 0, 1)     [16, 16]   strides (1, 16), from 256

A view is described by the strides it would have over the contiguous weight, so one rule (run the view on a tensor of the
meta device) serves every view op; what would have to copy cannot be followed. Steps that multiply by a constant, such as
weight norm, or round to a grid that holds zero, as the fake quantisation of QAT does, keep every zero where it is: the
product behind them reads an N:M weight if the parameter is one. So does a sum of what such steps made of one weight, as in
a straight-through estimator written by hand, ``w + (round(w / s) * s - w).detach()``.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nm_compiler.graph import arguments_of, target_name

aten = torch.ops.aten

_COPIES = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
           aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)  # fmt: skip
_VIEWS = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default,
    aten.matrix_H.default, aten.mH.default,
    aten.swapaxes.default, aten.movedim.int, aten.movedim.intlist, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, aten.narrow.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int,
    aten.tensor_split.sections, aten.tensor_split.indices,
}  # fmt: skip
_COPYING = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}  # run as a view, which never copies
_EXPANDED = (aten.expand.default, aten.expand_as.default)
_AS_ANOTHER = (aten.view_as.default, aten.reshape_as.default)
_SHAPES = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.empty_like.default, aten.zeros_like.default,
           aten.ones_like.default, aten.rand_like.default, aten.randn_like.default, aten.full_like.default)  # fmt: skip
_INDEXED = (aten.index.Tensor, aten.index_select.default)
_TURNED = (aten.flip.default, aten.roll.default)
_MOVED = (*_TURNED, aten.repeat.default, aten.gather.default)
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.dropout.default,
           aten.tril.default, aten.triu.default, aten.masked_fill.Scalar, aten.where.ScalarOther,
           aten._weight_norm.default, aten.fake_quantize_per_channel_affine.default,
           aten.fake_quantize_per_tensor_affine.default, aten.fake_quantize_per_tensor_affine.tensor_qparams,
           aten.fused_moving_avg_obs_fake_quant.default)  # fmt: skip
_ROUNDED = (aten.round.default, aten.round.decimals, aten.trunc.default, aten.fix.default, aten.sign.default,
            aten.sgn.default, aten.tanh.default)  # fmt: skip
_BOUNDED = {aten.clamp.default: ("min", "max"), aten.hardtanh.default: ("min_val", "max_val")}
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
_FILLS = (aten.masked_fill.Scalar, aten.where.ScalarOther)
_EITHER = (aten.mul.Tensor, aten.mul.Scalar)  # the weight may be either operand of these, of others only the first


@dataclass(frozen=True, slots=True)
class Seen:
    """A weight as a node shows it.

    path: the nodes from the one that reads the weight to this one; dims: the view of a contiguous weight, on the meta
    device (a list of them for split and its kin); indexed: strides of axes read through an index, and by which node;
    scaled: the first step that is no view.
    """

    path: tuple[Node, ...]
    dims: Any
    indexed: tuple[tuple[int, Node], ...] = ()
    scaled: Node | None = None

    @property
    def node(self) -> Node:
        """Where the view is."""
        return self.path[-1]


def start(read: Node) -> Seen:
    """The weight itself, at the node that reads it."""
    return Seen((read,), torch.empty(tuple(int(size) for size in read.meta["val"].shape), device="meta"))


def is_scale(node: Node) -> bool:
    """Whether a node multiplies, divides or rounds its first operand, or for a product of two either one, keeping zeros.

    A triangle of it, or all of it but what a mask fills with zeros, is a product with a table of ones and zeros.
    """
    if node.op != "call_function" or node.target not in _SCALES:
        return False
    return node.target not in _FILLS or bool(node.args[2] == 0)


def is_rounding(node: Node) -> bool:
    """Whether a node changes each entry of its first operand by itself, and a zero into zero."""
    if node.op != "call_function" or node.target not in _BOUNDED:
        return node.op == "call_function" and node.target in _ROUNDED
    given = arguments_of(node)
    low, high = (given[name] for name in _BOUNDED[node.target])
    return not isinstance(low, Node) and not isinstance(high, Node) and (low or 0) <= 0 <= (high or 0)


def is_sum(node: Node) -> bool:
    """Whether a node adds two tensors, or takes one off the other: zero where both are."""
    return node.op == "call_function" and node.target in _SUMS and all(isinstance(arg, Node) for arg in node.args[:2])


def is_copy(node: Node) -> bool:
    """Whether a node has the values and the shape of its first operand, perhaps in another dtype."""
    return node.op == "call_function" and node.target in _COPIES


def is_view(node: Node) -> bool:
    """Whether a node shows its first operand, as it is or a part of it."""
    known = (*_COPIES, *_VIEWS, *_EXPANDED, *_AS_ANOTHER, *_INDEXED, *_TURNED, operator.getitem)
    return node.op == "call_function" and node.target in known


def moves(node: Node) -> bool:
    """Whether a node shows entries of its first operand elsewhere, none of them changed or converted."""
    return node.op == "call_function" and node.target in (*_VIEWS, *_EXPANDED, *_AS_ANOTHER, *_INDEXED, *_MOVED)


def reads_shape_only(node: Node, weight: Node) -> bool:
    """Whether a node asks for the sizes or the dtype of a weight, not for its values."""
    return node.target in _SHAPES or (node.target in (*_AS_ANOTHER, aten.expand_as.default) and node.args[0] is not weight)


def step(seen: Seen, user: Node, constants: Collection[Node]) -> Seen | str | None:
    """The weight as ``user`` shows it, why it cannot be followed there, or None where ``user`` is no such step."""
    after = replace(seen, path=(*seen.path, user))
    if user.op != "call_function":
        return None
    if user.target is operator.getitem:
        return replace(after, dims=seen.dims[user.args[1]])
    if is_scale(user) and user in constants:
        return _scaled(after, seen.node)
    if not user.args or user.args[0] is not seen.node:
        return None
    if user.target in _COPIES:
        return after
    if is_rounding(user):
        return replace(after, scaled=seen.scaled or user) if user in constants else None
    if user.target in _INDEXED:
        return _indexed(after)
    if user.target in _TURNED:
        return _turned(after)
    try:
        if user.target in _EXPANDED:
            return replace(after, dims=_expand(seen.dims, user))
        if user.target in _AS_ANOTHER:
            return replace(after, dims=seen.dims.view([int(size) for size in user.meta["val"].shape]))
        if user.target in _VIEWS:
            return _viewed(after)
    except (RuntimeError, TypeError, ValueError):  # a copy would be needed, or a size depends on the input
        return f"{target_name(user.target)} mixes its axes: keep the parameter in the shape that its product reads"
    return None


def joined(seen: Seen, other: Seen, user: Node) -> Seen | None:
    """The weight as a sum of two things that were made of it shows it; None where they are not of the same entries."""
    if place_of(seen) != place_of(other):
        return None
    nearer = min(seen, other, key=lambda each: len(each.path))
    return replace(nearer, path=(*nearer.path, user), scaled=seen.scaled or other.scaled or user)


def place_of(seen: Seen) -> tuple[Any, ...]:
    """Which entries of the weight lie where: equal for two that show the same ones in the same places."""
    every = seen.dims if isinstance(seen.dims, (list, tuple)) else (seen.dims,)
    return seen.indexed, *((tuple(dims.shape), dims.stride(), dims.storage_offset()) for dims in every)


def _viewed(after: Seen) -> Seen:
    node = after.node
    target = aten.view.default if node.target in _COPYING else node.target
    found = target(after.dims, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    storage = after.dims.untyped_storage()._cdata
    if any(part.untyped_storage()._cdata != storage for part in (found if isinstance(found, (list, tuple)) else [found])):
        raise RuntimeError("copied")
    return replace(after, dims=found)


def _expand(dims: Tensor, user: Node) -> Tensor:
    """Sizes that depend on the input are left at 1: what matters is that they are no axes of the weight."""
    wanted = user.meta["val"].shape
    fixed = [1] * (len(wanted) - dims.ndim) + list(dims.shape)
    sizes = [old if old > 1 or not isinstance(new, int) else new for old, new in zip(fixed, wanted, strict=True)]
    return dims.expand(sizes)


def _indexed(after: Seen) -> Seen | str:
    """An axis read through an index keeps its place; further axes of the index come before it."""
    node, dims = after.node, after.dims
    args: tuple[Any, ...] = node.args
    if node.target is aten.index_select.default:
        axis, index = args[1] % dims.ndim, args[2]
    else:
        given = [(axis, index) for axis, index in enumerate(args[1]) if index is not None]
        if len(given) != 1 or given[0][1].meta["val"].dtype == torch.bool:
            return "indexed along several axes, or by a mask: make what is left the parameter"
        axis, index = given[0]
    stride = dims.stride(axis)
    for _ in range(index.meta["val"].ndim - 1):
        dims = dims.unsqueeze(axis)
    return replace(after, dims=dims, indexed=(*after.indexed, (stride, node)))


def _turned(after: Seen) -> Seen | str:
    """An axis read backwards, or from somewhere in it, is read through an index that nobody wrote down."""
    node, dims = after.node, after.dims
    axes = arguments_of(node)["dims"]
    if not axes:  # rolled as if it were flat
        return f"{target_name(node.target)} mixes its axes: keep the parameter in the shape that its product reads"
    return replace(after, indexed=(*after.indexed, *((dims.stride(axis), node) for axis in axes if dims.shape[axis] > 1)))


def _scaled(after: Seen, before: Node) -> Seen | None:
    node = after.node
    if node.target not in _EITHER and node.args[1 if node.target is aten.where.ScalarOther else 0] is not before:
        return None
    return replace(after, dims=_expand(after.dims, node), scaled=after.scaled or node)


def fragments(size: int, stride: int, shape: tuple[int, ...]) -> list[tuple[int, int, int]] | None:
    """Which axes of a contiguous weight an axis of a view walks along: (axis, step, count), the fastest first.

    >>> fragments(16, 4, (8, 2, 4))  # [8, 2, 4] seen as [16, 4]: its rows are axis 1, and in turns axis 0
    [(1, 1, 2), (0, 1, 8)]

    Returns None where it does not walk along axes.
    """
    found, at = [], 1
    for axis in reversed(range(len(shape))):
        length = shape[axis]
        if size > 1 and length > 1 and at <= stride < at * length:
            jump = stride // at
            most = -(-length // jump)
            if stride % at or (size > most and (length % jump or size % most)):
                return None
            found.append((axis, jump, min(size, most)))
            size, stride = (1, stride) if size <= most else (size // most, at * length)
        at *= length
    return found if size == 1 else None


def start_of(dims: Tensor, axis: int, shape: tuple[int, ...]) -> int:
    """Where along ``axis`` of the weight a view begins."""
    below = 1
    for length in shape[axis + 1 :]:
        below *= length
    return int(dims.storage_offset()) // below % shape[axis]
