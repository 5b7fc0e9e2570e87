"""In words: the inputs of a call, the user's line that was running, and why a model could not be captured."""

from __future__ import annotations

import dataclasses
import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.wording import dtype_name

_LONGEST = 200  # characters of a value in a message
LIBRARIES = tuple(str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""The folders of torch and of this package, so that torchvision is no part of torch."""
_ON_DATA = (
    "Control flow that depends on data cannot be captured: rewrite that line with torch.where or torch.cond, or move it "
    "out of the model."
)
_UNKNOWN_OUTPUT = (
    "torch.export takes outputs of types that it knows: return a tuple or a dict, or say once what yours holds, with "
    "torch.export.register_dataclass for a dataclass or torch.utils._pytree.register_pytree_node."
)
_FRAME = "Caused by: "  # the innermost frame, of torch or of this package, where the user's line is known
_CACHE = "Pass use_cache=False, or set config.use_cache = False: torch.export knows no caches of Hugging Face's models."
_UNKNOWN_INPUT = (
    "torch.export takes inputs of types that it knows: pass tensors, tuples or dicts, or say once what yours holds, with "
    "torch.export.register_dataclass for a dataclass or torch.utils._pytree.register_pytree_node."
)


def explain(model: nn.Module, error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> str:
    """Why a model could not be captured, in words: the call, the error, the line of the user's code, and the way out."""
    message = str(error).strip().split("\n\nWhile executing")[0].strip()
    mode = "training" if training else "evaluation"
    line = user_line(traceback.extract_tb(error.__traceback__))
    lines = [each for each in message.splitlines() if not (line and each.startswith(_FRAME))]
    short = "\n  ".join(lines[:6]) or type(error).__name__
    return (
        f"{type(model).__name__} could not be captured in {mode} mode with inputs {describe(args, kwargs)}\n"
        f"  {type(error).__name__}: {short}\n" + (f"  at {line}\n" if line else "") + _way_out(error)
    )


def _way_out(error: Exception) -> str:
    if "DataDependent" in type(error).__name__:
        return _ON_DATA
    if "in output, which is not a known type" in str(error):
        return _CACHE if "cache_utils" in str(error) else _UNKNOWN_OUTPUT
    if isinstance(error, TypeError) and "unhashable type" in str(error):  # torch 2.11, of an output that is a dataclass
        return _UNKNOWN_OUTPUT
    if "Unsupported input type" in str(error):
        return _UNKNOWN_INPUT
    return "Check that model(*example_inputs) runs."


def user_line(frames: Iterable[traceback.FrameSummary]) -> str | None:
    """The innermost of ``frames`` outside torch and this package: the line of the user's code."""
    found, standard = None, sysconfig.get_path("stdlib")
    for frame in frames:
        in_standard_library = frame.filename.startswith(standard) and "site-packages" not in frame.filename
        if not frame.filename.startswith(LIBRARIES) and not frame.filename.startswith("<") and not in_standard_library:
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            found = f"{frame.filename}:{frame.lineno} in {frame.name}: {code}"
    return found


def describe_leaf(value: Any) -> str:
    """``float32[2, 3]`` for a tensor, also inside a dataclass; the repr of anything else, its beginning if it is long."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if hasattr(value, each.name)}
        return f"{type(value).__name__}{describe((), held)}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call's inputs, tensors as dtype and shape."""
    parts = [_described(value) for value in args] + [f"{key}={_described(value)}" for key, value in kwargs.items()]
    return f"({', '.join(parts)})"


def _described(value: Any) -> str:
    leaves, spec = pytree.tree_flatten(value)
    return repr(_texts(spec, iter(leaves)))


def _texts(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """Texts in the place of leaves, in Python's own containers: others, such as caches, cannot be built of texts."""
    if spec.is_leaf():
        return _Text(describe_leaf(next(leaves)))
    parts = [_texts(child, leaves) for child in spec.children()]
    if spec.type.__module__ in ("builtins", "collections"):
        flat = pytree.TreeSpec(spec.type, spec.context, [pytree.tree_structure(0)] * len(parts))
        return pytree.tree_unflatten(parts, flat)
    return _Text(f"{spec.type.__name__}({', '.join(map(repr, parts))})")


class _Text(str):
    def __repr__(self) -> str:
        return str(self)
