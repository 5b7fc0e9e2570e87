"""What TorchDynamo's errors say to who called the model: the user's line, and the way out."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nm_compiler.capture.explaining import describe, user_line
from nm_compiler.errors import NMError
from nm_compiler.fragments.watching import python_line


def check_around(model: nn.Module) -> None:
    """Raises NMError inside what keeps TorchDynamo from compiling anything."""
    if torch._dynamo.config.disable:  # torch 2.11 would, for good, leave to Python what is called meanwhile
        raise NMError(
            f"TorchDynamo is switched off (torch._dynamo.config.disable, or TORCH_COMPILE_DISABLE=1), and the weights of this "
            f"{type(model).__name__} would be dense: switch it on, or give nm.compile example inputs, if it can be captured"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NMError(
            f"{type(model).__name__} was called inside torch.func (grad, vmap, ...), where TorchDynamo compiles "
            "nothing and its weights would be dense: take loss.backward() or torch.autograd.grad in its place, or "
            "nm.compile(model, example_inputs), whose graph torch.func can take, if it can be captured"
        )
    outer = _outer_mode()
    if outer is not None:
        raise NMError(
            f"{type(model).__name__} was called inside {outer}, a TorchDispatchMode, where TorchDynamo compiles "
            "nothing and its weights would be dense: use that mode before nm.compile or after nm.freeze, or on "
            "nm.compile(model, example_inputs), whose graph runs under it, if it can be captured"
        )


def explained(model: nn.Module, error: BaseException, limit: int) -> str:
    """The message for an error of TorchDynamo or of a fragment that could not be rewritten. limit: of recompilations."""
    kind = type(model).__name__
    line = user_line(traceback.extract_tb(error.__traceback__)) or _line_in(str(error))
    at = f"\n  at {line}" if line else ""
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return (
            f"{kind}: TorchDynamo compiled one function {limit} times, and would run it without masks from now on{at}\n"
            "An argument, an attribute or the length of a list in it takes ever new values (TORCH_LOGS=recompiles says "
            "which): pass it as a tensor, a list of tensors as one that is stacked and padded to a few lengths, or raise "
            "torch._dynamo.config.recompile_limit"
        )
    return (
        f"{kind}: a fragment of its forward could not be rewritten: {type(error).__name__}: {_first_lines(error, 4)}{at}\n"
        "Write that line with other ops, or move it behind a @torch._dynamo.disable function that reads no weights"
    )


def own_fault(
    model: nn.Module, args: Any, kwargs: Any, error: torch._dynamo.exc.TorchRuntimeError, inner: BaseException
) -> str:
    """The message for an op that fails. inner: what the op said, without TorchDynamo's words around it."""
    line = user_line(error.real_stack) or python_line()
    return (
        f"{type(model).__name__} fails on inputs {describe(args, kwargs)}\n"
        f"  {type(inner).__name__}: {_first_lines(inner, 4)}\n  at {line}\nCheck that it runs on them without nm.compile."
    )


def of_the_op(error: BaseException) -> BaseException:
    """What the op itself raised, without what TorchDynamo put around it; how many times it does depends on the version."""
    inner: BaseException | None = error
    dynamos = torch._dynamo.exc.TorchDynamoException
    while inner is not None and (isinstance(inner, dynamos) or str(inner).startswith("Dynamo failed to run FX node")):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def _first_lines(error: BaseException, count: int) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return "\n  ".join(lines[:count])


def _line_in(message: str) -> str | None:
    """The user's line where Dynamo's message quotes one."""
    found = [line.strip() for line in message.splitlines() if line.strip().startswith('File "')]
    return found[-1] if found else None


def _outer_mode() -> str | None:
    """A dispatch mode around the call in which TorchDynamo leaves all as it is, such as a counter of flops."""
    for mode in _get_current_dispatch_mode_stack():
        if not (hasattr(mode, "ignore_compile_internals") and mode.ignore_compile_internals()):
            return type(mode).__name__
    return None
