"""Masked weights: what a method multiplies with instead of W, and how gradients come back to W and its scores."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from nm_compiler.layout import as_groups, as_rows
from nm_compiler.ops import masks as _masks  # noqa: F401 - registers live_mask
from nm_compiler.ops.lean import custom_op
from nm_compiler.ops.made_of import made_of
from nm_compiler.pattern import Pattern
from nm_compiler.solvers import gpu, sweeps
from nm_compiler.solvers.combinations import undecided
from nm_compiler.solvers.live import gradients
from nm_compiler.solvers.masks import keep_largest
from nm_compiler.solvers.select import decayed, keep, where

_STRIDED = (torch.Tag.flexible_layout,)  # torch.compile may lay arguments out as it likes: results follow the weight's strides


@custom_op("nm::score_weight", mutates_args=(), tags=_STRIDED)
def score_weight(
    weight: Tensor, scores: Tensor, live: Tensor, table: Tensor, last: int, rows: list[int], by_position: bool
) -> Tensor:
    """LBC's forward weight W * mask, through which the scores learn. Ref: LBC, eq. 6 and 7.

    weight: floating; rows: its axes as (*batch, out, *taps, in), see `nm_compiler.layout`. live, table: as in `live_mask`,
    whose mask it is; kernels choose it, here and in the gradient, without writing it down.
    scores: the weight's shape (by_position) or ``[*batch, out, groups per row, C]``. last: live entries of a decided group.
    With g the gradient of the result: dW = mask * g; dscore_c = live_c * sum of W_j g_j over j in c, straight-through,
    or dscore_j = W_j g_j by position. A decided group gets a zero score gradient.
    """
    return _covered(weight, live, table, rows)


def _covered(values: Tensor, live: Tensor, table: Tensor, rows: list[int]) -> Tensor:
    """``values`` where a live combination covers them, else 0, in their own strides."""
    out = torch.empty_like(values)
    if gpu.covered(values, live, table, out, rows) or sweeps.covered(values, live, table, out, rows):
        return out
    return keep(values, torch.ops.nm.live_mask(live, table, list(values.shape), rows))


@score_weight.register_fake
def _(weight: Tensor, scores: Tensor, live: Tensor, table: Tensor, last: int, rows: list[int], by_position: bool) -> Tensor:
    return torch.empty_like(weight)


@custom_op("nm::score_weight_backward", mutates_args=(), tags=_STRIDED)
def score_weight_backward(
    grad: Tensor, weight: Tensor, live: Tensor, table: Tensor, last: int, rows: list[int], by_position: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `score_weight`: ``(dW, dscores)``, shapes of the weight and of the scores."""
    if by_position and table.ndim == 3 and last == 1:
        results = torch.empty_like(weight), torch.empty_like(weight)
        if any(kernels.gradients(grad, weight, live, table, results, rows) for kernels in (gpu, sweeps)):
            return results
        g, w, dw, ds = (as_rows(tensor, rows) for tensor in (grad, weight, *results))
        if gradients(g, w, live, table, (dw, ds)):
            return results
    m, mask = table.shape[-1], torch.ops.nm.live_mask(live, table, list(weight.shape), rows)
    grad_weight = torch.where(mask, grad, grad.new_zeros(()))
    if grad_weight.stride() != weight.stride():
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    choice = undecided(live, packed=table.ndim == 3, last=last)
    if by_position:
        moved = torch.empty_like(weight)
        torch.mul(weight, grad_weight, out=moved)
        if live.device.type != "cpu" or not bool(choice.all()):  # asking a GPU would stall it; asking the CPU is free
            groups = as_groups(moved, rows, m)
            groups *= choice.view(groups.shape[:-1]).unsqueeze(-1)
        return grad_weight, moved
    moved = as_groups(weight * grad_weight, rows, m).reshape(*live.shape[:-1], m)
    return grad_weight, (moved @ table.to(moved.dtype).T) * live * choice.unsqueeze(-1)


@score_weight_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, live: Tensor, table: Tensor, last: int, rows: list[int], by_position: bool
) -> tuple[Tensor, Tensor]:
    scores = torch.empty_like(weight) if by_position else live.new_empty(live.shape, dtype=weight.dtype)
    return torch.empty_like(weight), scores


def _score_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _scores, live, table, last, rows, by_position = inputs
    ctx.save_for_backward(weight, live, table)
    ctx.rest = (last, rows, by_position)


def _score_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, live, table = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *_differentiable_gradients(grad, weight, live, table, *ctx.rest), None, None, None, None, None
    if not ctx.needs_input_grad[1]:
        return _covered(grad, live, table, ctx.rest[1]), None, None, None, None, None, None
    grad_weight, grad_scores = torch.ops.nm.score_weight_backward(grad, weight, live, table, *ctx.rest)
    return grad_weight, grad_scores, None, None, None, None, None


def _differentiable_gradients(
    grad: Tensor, weight: Tensor, live: Tensor, table: Tensor, last: int, rows: list[int], by_position: bool
) -> tuple[Tensor, Tensor]:
    """As `score_weight_backward`, by torch operations, for gradients of gradients."""
    m = table.shape[-1]
    grad_weight = where(grad, torch.ops.nm.live_mask(live, table, list(weight.shape), rows))
    choice = undecided(live, packed=table.ndim == 3, last=last)
    if not by_position:
        moved = as_groups(weight * grad_weight, rows, m).reshape(*live.shape[:-1], m)
        return grad_weight, (moved @ table.to(moved.dtype).T) * live * choice.unsqueeze(-1)
    learns = torch.empty_like(weight, dtype=torch.bool)
    groups = as_groups(learns, rows, m)
    groups.copy_(choice.view(groups.shape[:-1]).unsqueeze(-1))
    return grad_weight, where(weight * grad_weight, learns)


def score_gradients(
    grad: Tensor, needs: tuple[bool, ...], result: Any, weight: Tensor, scores: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """``(dW, dscores)`` where no graph is recorded, see `nm_compiler.ops.together`; rest: as in `score_weight`."""
    live, table, last, rows, by_position = rest
    if not needs[1]:
        return _covered(grad, live, table, rows), None
    found: tuple[Tensor, Tensor] = score_weight_backward.kernel(grad, weight, live, table, last, rows, by_position)
    return found


@made_of("score_weight")
def _(weight: Tensor, scores: Tensor, live: Tensor, table: Tensor, last: int, rows: list[int], by_position: bool) -> Tensor:
    mask = torch.ops.nm.live_mask(live, table, list(weight.shape), rows)
    return torch.where(torch.empty_like(weight, dtype=torch.bool).copy_(mask), weight, 0)  # in the strides of the weight


score_weight.register_autograd(_score_backward, setup_context=_score_setup)


@custom_op("nm::srste_weight", mutates_args=(), tags=_STRIDED)
def srste_weight(weight: Tensor, n: int, m: int, in_axis: int, decay: float) -> Tensor:
    """W * F, F the top ``n`` magnitudes of every ``m`` along the input axis. Ref: SR-STE, eq. 5; Bi-Mask, eq. 10.

    Straight-through with a pull of the pruned weights to zero: dW = g + decay * (1 - F) * W.
    """
    return keep_largest(weight, n, m, in_axis)


@srste_weight.register_fake
def _(weight: Tensor, n: int, m: int, in_axis: int, decay: float) -> Tensor:
    return torch.empty_like(weight)


def _srste_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.decay = inputs[4]


def _srste_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, masked = ctx.saved_tensors
    return decayed(grad, weight, masked, ctx.decay), None, None, None, None


def srste_gradient(grad: Tensor, needs: Any, masked: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor]:
    """``(dW,)`` where no graph is recorded; masked: what `srste_weight` returned, rest: its other arguments."""
    return (decayed(grad, weight, masked, rest[-1]),)


srste_weight.register_autograd(_srste_backward, setup_context=_srste_setup)


@custom_op("nm::masked_weight", mutates_args=(), tags=_STRIDED)
def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """W * mask for a fixed bool mask of the weight's shape: dW = mask * g."""
    return keep(weight, mask)


@masked_weight.register_fake
def _(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _masked_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _masked_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    kept = where if torch.is_grad_enabled() else keep  # kernels cannot be differentiated
    return kept(grad, mask), None


def masked_gradient(grad: Tensor, needs: Any, result: Any, weight: Tensor, mask: Tensor) -> tuple[Tensor]:
    """``(dW,)`` where no graph is recorded."""
    return (keep(grad, mask),)


@made_of("masked_weight")
def _(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, 0)


masked_weight.register_autograd(_masked_backward, setup_context=_masked_setup)


@custom_op("nm::backward_weight", mutates_args=(), tags=_STRIDED)
def backward_weight(masked: Tensor, order: Tensor, n: int, m: int, rows: list[int]) -> Tensor:
    """Bi-Mask's backward weight W * B, B the top ``n`` of every ``m`` output rows, taken in ``order``.

    masked: W * F; rows: its axes as (*batch, out, *taps, in); order: int64 ``[*batch, out]``, ``new[i] = old[order[i]]``,
    within the blocks of rows. B is a subset of F. Its gradient, which only gradients of gradients have, goes straight through.
    Ref: Bi-Mask, eq. 8.
    """
    *batch, out_axis = rows[: order.ndim]
    out_axis -= sum(axis < out_axis for axis in batch)
    result = torch.empty_like(masked)
    if gpu.largest_rows(as_rows(masked, rows), order, n, m, as_rows(result, rows)):
        return result
    for index in itertools.product(*map(range, order.shape[:-1])):
        own, place = _at(masked, batch, index), _at(result, batch, index)
        if out_axis == 0 and sweeps.largest_rows(own, order[index], Pattern(n, m), place):
            continue
        ordered = own.index_select(out_axis, order[index])
        kept = keep_largest(ordered, n, m, out_axis)
        place.copy_(kept.index_select(out_axis, order[index].argsort()))
    return result


@custom_op("nm::backward_groups", mutates_args=(), tags=_STRIDED)
def backward_groups(masked: Tensor, n: int, m: int, out_axis: int) -> Tensor:
    """`backward_weight` for output rows that lie in their order: W * B, B the top ``n`` of every ``m`` along ``out_axis``."""
    return keep_largest(masked, n, m, out_axis)


@backward_groups.register_fake
def _(masked: Tensor, n: int, m: int, out_axis: int) -> Tensor:
    return torch.empty_like(masked)


def _at(tensor: Tensor, axes: list[int], index: tuple[int, ...]) -> Tensor:
    """One expert of several: a view."""
    for axis, place in sorted(zip(axes, index, strict=True), reverse=True):
        tensor = tensor.select(axis, place)
    return tensor


@backward_weight.register_fake
def _(masked: Tensor, order: Tensor, n: int, m: int, rows: list[int]) -> Tensor:
    return torch.empty_like(masked)


def through_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The setup_context of `through`: remembers how many inputs follow the weight, which get no gradient."""
    ctx.set_materialize_grads(False)  # products send none: only what is done with the gradients that they gave does
    ctx.others = len(inputs) - 1


def through(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of a backward weight: straight through to what it was made of."""
    return grad, *(None for _ in range(ctx.others))


def through_gradient(grad: Tensor, needs: tuple[bool, ...], result: Any, *rest: Any) -> tuple[Tensor]:
    """``(dW,)``, straight through."""
    return (grad,)


backward_weight.register_autograd(through, setup_context=through_setup)
backward_groups.register_autograd(through, setup_context=through_setup)


MASKED = (torch.ops.nm.score_weight.default, torch.ops.nm.srste_weight.default, torch.ops.nm.masked_weight.default)
"""The ops here whose result stands for a weight in the rewritten graph; all take the weight first."""
BACKWARD = (torch.ops.nm.backward_weight.default, torch.ops.nm.backward_groups.default)
"""The ops that make W * B out of W * F."""


def stands_for_weight(target: Any) -> bool:
    """Whether a node with this target is what is multiplied with in place of its first argument, a weight."""
    return target in MASKED or getattr(target, "stands_for_weight", False) is True


def makes_backward(target: Any) -> bool:
    """Whether a node with this target makes W * B, which input gradients go through, out of its first argument, W * F."""
    return target in BACKWARD or getattr(target, "makes_backward", False) is True
