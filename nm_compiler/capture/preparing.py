"""What compile, permute and show_axes do first: look at the model and the inputs, and capture both modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nm_compiler.capture.exported import Exported
from nm_compiler.capture.routes import take
from nm_compiler.errors import NMError
from nm_compiler.module import SparseModule
from nm_compiler.state.beside import MARK

if TYPE_CHECKING:
    from nm_compiler.fragments.dynamo import Fragments

Routes = Mapping[bool, "Exported | Fragments"]


def captured(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any, *, what: str,
    modes: Sequence[bool] = (False, True), whole: bool = False,
) -> Routes:  # fmt: skip
    """``modes`` of ``model``, captured: evaluation (False), training (True). what: the function called, for messages.

    whole: as one graph each, or not at all.
    Raises NMError for no model, inputs that do not fit, or what neither export nor TorchDynamo can take.
    """
    check_model(model, what)
    args = arguments(example_inputs, kwargs, what)
    args, named = pytree.tree_map_only(Tensor, normal, (args, dict(kwargs or {})))
    if any(parameter.is_meta for parameter in model.parameters()):  # a shape without values is captured with such inputs
        args, named = pytree.tree_map_only(Tensor, _valueless, (args, named))
    return take(model, args, named, dynamic_shapes, modes, trains=what == "nm.compile", whole=whole)


def globs(given: Sequence[str]) -> tuple[str, ...]:
    """One glob or several. Raises NMError for what is none."""
    several = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for each in several:
        if not isinstance(each, str):
            raise NMError(
                f"{each!r} is no glob: include=, exclude= and force= take parameter names such as 'layer4.*', as a list"
            )
    return several


def check_model(model: Any, what: str) -> None:
    """Raise NMError for what is no model, or one whose weights could not be masked or moved."""
    if not isinstance(model, nn.Module):
        raise NMError(f"{what} takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or (isinstance(model, GraphModule) and "train" in model.__dict__):
        made = "torch.jit" if isinstance(model, torch.jit.ScriptModule) else "torch.export"
        raise NMError(f"{what} takes the model that was given to {made}, not what that made of it ({type(model).__name__})")
    marked = [name for name, module in model.named_modules() if MARK in module.__dict__]
    if isinstance(model, SparseModule) or marked:
        raise NMError(
            f"this {type(getattr(model, 'origin', model)).__name__} is compiled already{_where(marked)}: use the first "
            f"nm.compile's result, or nm.freeze it (a copy.deepcopy of it, if it trains on) before {what}"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        do = what.removeprefix("nm.")
        raise NMError(f"{do} the model itself, then wrap the result: this is a {type(model).__name__} around it")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise NMError(f"{name} has no shape yet (a lazy layer): run one batch through the model before {what}")
        _check_plain(name, parameter, what)
    if what in ("nm.compile", "nm.permute"):
        check_normal(model, what)
    _check_devices(dict(model.named_parameters()), what)


def check_normal(model: nn.Module, what: str) -> None:
    """Raise NMError for a tensor that was made under `torch.inference_mode`: it can be in no trace of autograd, for good."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise NMError(
                f"{name} of shape {list(tensor.shape)} was made under torch.inference_mode(): make or load the model outside "
                f"of it, or give {what} a copy made outside, copy.deepcopy(model), whose tensors are normal ones"
            )


def _check_plain(name: str, parameter: Tensor, what: str) -> None:
    """Sharded and quantised weights hold their values in other tensors, which no mask here could reach."""
    inner = getattr(parameter, "data", parameter)
    if parameter.is_quantized or is_traceable_wrapper_subclass(inner):
        kind = type(inner).__name__ if not parameter.is_quantized else str(parameter.dtype)
        sharded = kind == "DTensor"
        way = (
            f"{what} the whole model first, then shard it"
            if sharded
            else f"{what} the floating-point model, quantise it afterwards"
        )
        raise NMError(
            f"{name} of shape {list(parameter.shape)} is a {kind}, {'sharded' if sharded else 'quantised'} already: {way}"
        )


def _check_devices(parameters: Mapping[str, Tensor], what: str) -> None:
    """One device for all, which may be meta: planning needs no values."""
    first = next(iter(parameters.items()), None)
    for name, parameter in parameters.items():
        if first is not None and parameter.device != first[1].device:
            empty = (
                " (it has no values: model.to_empty(device=...) and load weights)"
                if parameter.is_meta or first[1].is_meta
                else ""
            )
            raise NMError(
                f"{first[0]} is on {first[1].device}, {name} of shape {list(parameter.shape)} on {parameter.device}{empty}: "
                f"a captured graph runs on one device; move the model there with model.to(device) before {what}"
            )


def normal(example: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under `torch.inference_mode`: such a one cannot be traced."""
    return example.clone() if example.is_inference() else example


def _valueless(example: Tensor) -> Tensor:
    return example.to("meta")


def arguments(example_inputs: Any, kwargs: Mapping[str, Any] | None, what: str) -> tuple[Any, ...]:
    """The positional inputs as a tuple. Raises NMError if there are neither positional nor keyword inputs, or not as such."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise NMError(
            f"{what}(model, example_inputs, kwargs): kwargs is a {type(kwargs).__name__}, not keyword inputs by their names. "
            "Several positional inputs go into one tuple, (x, y); options are given by name"
        )
    if example_inputs is None and not kwargs:
        raise NMError(f"{what}(model, example_inputs): give inputs to capture the model with, such as (x,)")
    if example_inputs is None:
        return ()
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def _where(marked: list[str]) -> str:
    return f" (its submodule {marked[0]!r} owns N:M weights)" if marked and marked[0] else ""
