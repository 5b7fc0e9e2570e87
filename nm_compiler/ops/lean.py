"""`custom_op`: as `torch.library.custom_op`, for ops that run for every weight in every step.

torch's own wrapper looks defaults up in the schema, asks whether results alias arguments, and enters and leaves TorchDynamo,
at every call. An op made here does none of it where nothing can depend on it, and is the same op to everything else: to
`torch.export`, `torch.compile`, autograd, fake tensors, autocast and dispatch modes. Unlike torch's, it has gradients under
`torch.func` as well. Defined again, as a notebook does, it replaces the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKey
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.custom_ops import get_library_allowing_overwrite
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from nm_compiler.errors import NMError

Function = Callable[..., Any]

_PLAIN = (DispatchKey.CPU, DispatchKey.CUDA)  # where a call ends that no mode and no subclass looks at


class Op:
    """An op without side effects, whose results are new tensors. Call it, or let a graph call its overload."""

    def __init__(self, name: str, function: Function, schema: str, tags: Sequence[torch.Tag]) -> None:
        space, _, own = name.partition("::")
        self.name, self._library, self._function = name, get_library_allowing_overwrite(space, own), _outside_dynamo(function)
        self.kernel = function  # what it does, for callers who know that nobody looks
        self._library.define(own + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        self._opoverload: Any = getattr(getattr(torch.ops, space), own).default
        self.overload = self._opoverload
        arguments = self._opoverload._schema.arguments
        if any(argument.kwarg_only for argument in arguments):
            raise TypeError(f"{name}{schema}: only positional arguments")
        self._defaults = tuple(argument.default_value for argument in arguments)
        self.backward: Function | None = None
        self.setup: Function | None = None
        self._gradient = self._autograd_function(f"{space}_{own}", torch.autograd.Function)
        self._gradient_of_a_level = self._autograd_function(f"{space}_{own}", _SingleLevelFunction)
        self._library.impl(own, self._function, "CompositeExplicitAutograd")
        self._library.impl(own, self._differentiable, "Autograd", with_keyset=True)
        torch.library.register_vmap(name, self._one_by_one, lib=self._library)

    def __call__(self, *args: Any) -> Any:
        return self._opoverload(*args)

    def register_fake(self, function: Function) -> Function:
        """What it returns for tensors without values; as `torch.library.register_fake`."""
        torch.library.register_fake(self.name, function, lib=self._library)
        return function

    def register_autograd(self, backward: Function, *, setup_context: Function | None = None) -> None:
        """As `torch.library.register_autograd`: ``backward(ctx, *grads)``, ``setup_context(ctx, inputs, output)``."""
        self.backward, self.setup = backward, setup_context

    def _differentiable(self, keyset: Any, *args: Any) -> Any:
        args += self._defaults[len(args) :]  # the dispatcher leaves out what equals a default
        if forward_ad._current_level >= 0:
            self._check_tangents(args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return self._below(keyset, *args)
        if not torch._C._are_functorch_transforms_active():
            return self._gradient.apply(keyset, *args)
        with enable_single_level_autograd_function():  # torch.func.grad: this is its level, `_below` goes to the next one out
            return self._gradient_of_a_level.apply(keyset, *args)

    def _check_tangents(self, args: Any) -> None:
        """Raise NMError in forward-mode differentiation, of which the op knows nothing: it would drop tangents."""
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NMError(
                f"{self.name} on {list(tensors[0].shape)} has no forward-mode gradient (torch.func.jvp, jacfwd, hessian): "
                "take torch.func.grad, vjp or jacrev, or nm.freeze the model first, whose weights are plain ones"
            )

    def _below(self, keyset: Any, *args: Any) -> Any:
        """The op itself: at once if nothing is in between, else through the dispatcher."""
        left = (keyset & torch._C._after_autograd_keyset).remove(DispatchKey.ADInplaceOrView)
        with torch._C._AutoDispatchBelowAutograd():
            if left.highestPriorityTypeId() in _PLAIN:
                return self._function(*args)
            return self._opoverload.redispatch(left, *args)

    def _one_by_one(self, info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        """Under `torch.vmap`, as of an ensemble: a call for each, as torch does unasked, but with a warning an op."""
        found = []
        for at in range(info.batch_size):
            found.append(self._opoverload(*(_taken(arg, dim, at) for arg, dim in zip(args, in_dims, strict=True))))
        if isinstance(found[0], torch.Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

    def _autograd_function(self, name: str, base: type) -> Any:
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            # the levels of torch.func further out may want gradients too
            with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
                result = self._below(keyset, *args)
            if self.setup:
                self.setup(ctx, args, result)
            return result

        def backward(ctx: Any, *grads: Any) -> Any:
            if self.backward is None:
                raise RuntimeError(f"{self.name} has no gradient")
            found = self.backward(_Context(ctx), *grads)
            return (None, *found) if isinstance(found, tuple) else (None, found)

        both = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"{name}_gradient", (base,), both)


def _taken(arg: Any, dim: Any, at: int) -> Any:
    """One argument of one call. dim: the batched axis, or a list of such for a list of tensors; else it is the same in all."""
    if isinstance(dim, list):
        return [_taken(each, inner, at) for each, inner in zip(arg, dim, strict=True)]
    return arg if dim is None else arg.select(dim, at)


class _Context:
    """An autograd context without the key set, which an op puts before its own arguments."""

    __slots__ = ("_of",)

    def __init__(self, of: Any) -> None:
        self._of = of

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        return self._of.needs_input_grad[1:]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def custom_op(
    name: str, *, mutates_args: tuple[()] = (), tags: Sequence[torch.Tag] = (), schema: str | None = None
) -> Callable[[Function], Op]:
    """Decorate a function of annotated positional arguments, which changes none of them and returns new tensors.

    name: ``"nm::name"``; schema: read off the annotations by default, see `torch.library.infer_schema`.
    """

    def make(function: Function) -> Op:
        return Op(name, function, schema or torch.library.infer_schema(function, mutates_args=mutates_args), tags)

    return make


def _outside_dynamo(function: Function) -> Function:
    """The function, hidden from TorchDynamo where it watches: it must not compile what an op does inside."""
    hidden = torch.compiler.disable(function)

    def run(*args: Any) -> Any:
        return hidden(*args) if callable(get_eval_frame_callback()) else function(*args)

    return run
