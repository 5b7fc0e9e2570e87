"""An op of many weights as one call in plain eager execution: one autograd node, and no dispatch for each.

`together` runs the kernels of the single ops, one weight after the other, and gives their values and gradients to the bit,
gradients of gradients up to the order of their sums. It calls the ops themselves wherever anything looks at calls: compilers
and tracers, dispatch and function modes, functorch, fake tensors and other subclasses, hooks on saved tensors (activation
checkpointing, offloading), weights that are no leaves or that have hooks, and gradients of gradients.

As with the single ops, each weight can go through its own backward pass: a loss that reads some of the weights frees what
was kept for those, and weights that it does not read get no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _autograd as autograd
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from nm_compiler.ops.lean import Op
from nm_compiler.ops.masks import unpack_mask, unpack_masks
from nm_compiler.ops.weights import (
    backward_groups,
    backward_weight,
    masked_gradient,
    masked_weight,
    score_gradients,
    score_weight,
    srste_gradient,
    srste_weight,
    through_gradient,
)

_TYPES = (Tensor, torch.nn.Parameter)
_DEVICES = ("cpu", "cuda")

_AGAIN = (
    "Trying to backward through the graph a second time: what the mask of a weight kept was freed. "
    "Specify retain_graph=True if you need to backward through the graph a second time"
)
_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "a weight, or the state beside it, between its forward and its backward pass"
)


class Kind(NamedTuple):
    """How one op runs many times.

    learned: how many arguments, the leading ones, get gradients
    kept: which arguments the gradient reads; with_result: whether it reads what the op returned too; one that reads neither
    keeps nothing, so that its arguments may belong to anybody
    gradients: ``(grad, needs, result, *arguments) -> one for each learned``
    many: all calls at once, for an op that nothing is learned through
    """

    op: Op
    learned: int = 0
    kept: tuple[int, ...] = ()
    with_result: bool = False
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None
    many: Callable[[Sequence[Sequence[Any]]], Sequence[Tensor]] | None = None

    @property
    def keeps(self) -> bool:
        """Whether a backward pass reads anything but its gradients."""
        return self.with_result or bool(self.kept)


KINDS = {
    kind.op.overload: kind
    for kind in (
        Kind(unpack_mask, many=unpack_masks),
        Kind(score_weight, 2, (0, 2, 3), False, score_gradients),
        Kind(srste_weight, 1, (0,), True, srste_gradient),
        Kind(masked_weight, 1, (1,), False, masked_gradient),
        Kind(backward_weight, 1, gradients=through_gradient),
        Kind(backward_groups, 1, gradients=through_gradient),
    )
}
"""By overload, an op before those that read its results."""


def together(overload: Any, calls: Sequence[Sequence[Any]]) -> Sequence[Tensor]:
    """``[overload(*call) for call in calls]``, tensors on one device. overload: of `KINDS`."""
    kind = KINDS[overload]
    learned = [value for call in calls for value in call[: kind.learned]]
    if not _is_plain() or not _are_plain(calls, learned if kind.keeps else ()):
        return [overload(*call) for call in calls]
    if learned and torch.is_grad_enabled() and any(value.requires_grad for value in learned):
        results: tuple[Tensor, ...] = _Together.apply(kind, calls, *learned)  # type: ignore[no-untyped-call]
        return results
    with torch._C._AutoDispatchBelowAutograd():
        return _computed(kind, calls)


def _computed(kind: Kind, calls: Sequence[Sequence[Any]]) -> Sequence[Tensor]:
    with _profiled(kind.op.name):
        return [kind.op.kernel(*call) for call in calls] if kind.many is None else kind.many(calls)


def _profiled(name: str) -> contextlib.AbstractContextManager[Any]:
    """Under a profiler, what is done here has the name of the single op."""
    return torch.profiler.record_function(name) if autograd._profiler_enabled() else contextlib.nullcontext()


def _is_plain() -> bool:
    """Whether nothing looks at the calls of this thread."""
    return not (
        torch.compiler.is_compiling()
        or callable(get_eval_frame_callback())
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _are_plain(calls: Sequence[Sequence[Any]], learned: Sequence[Tensor]) -> bool:
    """Whether all tensors have values, on one device, and all weights belong to the user, who has no hooks on them."""
    if type(calls[0][0]) not in _TYPES or calls[0][0].device.type not in _DEVICES:
        return False
    device = calls[0][0].device
    for value in chain.from_iterable(calls):
        if isinstance(value, Tensor) and (type(value) not in _TYPES or value.device != device):
            return False
    return not any(value._backward_hooks or not value.is_leaf for value in learned)


class _Together(torch.autograd.Function):
    """Keeps arguments beside autograd, which would free all of them after the first gradient that comes."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, calls: Sequence[Sequence[Any]], *learned: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            results = tuple(_computed(kind, calls))
        frozen = [result for result, call in zip(results, calls, strict=True) if not _learns(kind, call)]
        ctx.mark_non_differentiable(*frozen)  # so that nothing is propagated back to where nothing learns
        if kind.with_result:
            ctx.save_for_backward(*results)  # read only where a graph is recorded: what is kept below does not belong to one
        kept = [result.detach() for result in results] if kind.with_result else [None] * len(calls)
        entries = [_entry(kind, call, result) for call, result in zip(calls, kept, strict=True)] if kind.keeps else []
        ctx.kind, ctx.entries = kind, entries
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kind: Kind = ctx.kind
        single = torch.is_grad_enabled() or not _is_plain()
        with _profiled(f"{kind.op.name}_backward"):
            return _Together._gradients(ctx, kind, single, grads)

    @staticmethod
    def _gradients(ctx: Any, kind: Kind, single: bool, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        keep = autograd._get_current_graph_task_keep_graph()
        found: list[Tensor | None] = [None, None]
        for index, grad in enumerate(grads):
            if grad is None:
                found += [None] * kind.learned
                continue
            needs = ctx.needs_input_grad[2 + index * kind.learned : 2 + (index + 1) * kind.learned]
            assert kind.gradients is not None
            if not kind.keeps:
                found += kind.gradients(grad, needs, None)
                continue
            entry = ctx.entries[index]
            if entry is None:
                raise RuntimeError(_AGAIN)
            call, result, versions = entry
            if _versions(kind, call, result) != versions:
                raise RuntimeError(_CHANGED)
            if single or type(grad) not in _TYPES:
                found += _by_the_op(kind, grad, needs, call, ctx.saved_tensors[index] if kind.with_result else None)
            else:
                found += kind.gradients(grad, needs, result, *call)
            if not keep:
                ctx.entries[index] = None
        return tuple(found)


def _learns(kind: Kind, call: Sequence[Any]) -> bool:
    return any(value.requires_grad for value in call[: kind.learned])


def _entry(kind: Kind, call: Sequence[Any], result: Tensor | None) -> tuple[Sequence[Any], Tensor | None, list[int]]:
    return call, result, _versions(kind, call, result)


def _versions(kind: Kind, call: Sequence[Any], result: Tensor | None) -> list[int]:
    own = [call[place]._version for place in kind.kept]
    return own if result is None else [*own, result._version]


class _Context:
    """What an op's own backward asks of autograd."""

    saved_tensors: tuple[Tensor, ...] = ()

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def _by_the_op(
    kind: Kind, grad: Tensor, needs: tuple[bool, ...], call: Sequence[Any], result: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients by the single op's own backward, through which a graph may be recorded."""
    context = _Context((*needs, *(False for _ in call[kind.learned :])))
    assert kind.op.setup is not None
    assert kind.op.backward is not None
    kind.op.setup(context, tuple(call), result)
    found: tuple[Tensor | None, ...] = kind.op.backward(context, grad)
    return found[: kind.learned]
