"""What compile, permute and show_axes do first: look at the model and the inputs, and capture both modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.errors import NMError
from nm_compiler.exported import Exported
from nm_compiler.module import SparseModule
from nm_compiler.routes import take
from nm_compiler.state import MARK

if TYPE_CHECKING:
    from nm_compiler.dynamo import Fragments

Routes = Mapping[bool, "Exported | Fragments"]


def prepared(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any, *, what: str
) -> Routes:
    """Both modes of ``model``, captured. what: the function that was called, for messages. Raises NMError."""
    check_model(model, what)
    args = _arguments(example_inputs, kwargs, what)
    args, named = pytree.tree_map_only(Tensor, _normal, (args, dict(kwargs or {})))
    _check_meta(model, (args, named), what)
    return take(model, args, named, dynamic_shapes)


def globs(given: Sequence[str]) -> tuple[str, ...]:
    """One glob or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def check_model(model: Any, what: str) -> None:
    """Raise NMError for what is no model, or one whose weights cannot be masked or moved."""
    if not isinstance(model, nn.Module):
        raise NMError(f"{what} takes a torch.nn.Module, not {type(model).__name__}")
    marked = [name for name, module in model.named_modules() if MARK in module.__dict__]
    if isinstance(model, SparseModule) or marked:
        raise NMError(
            f"this {type(model).__name__} is compiled already{_where(marked)}: use the first nm.compile's result, "
            f"or nm.freeze it before {what}"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        do = what.removeprefix("nm.")
        raise NMError(f"{do} the model itself, then wrap the result: this is a {type(model).__name__} around it")
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter, what)
    _check_devices(model, what)


def _check_parameter(name: str, parameter: Tensor, what: str) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise NMError(f"{name} has no shape yet (a lazy layer): run one batch through the model before {what}")
    kind = type(parameter.data).__name__
    if kind == "DTensor":
        raise NMError(
            f"{name} of shape {list(parameter.shape)} is a DTensor, sharded over ranks: call {what} on the whole model, "
            "and shard it afterwards"
        )
    if parameter.is_quantized or (kind not in ("Tensor", "Parameter", "FakeTensor") and hasattr(parameter, "dequantize")
                                  and type(parameter.data).__torch_function__ is not Tensor.__torch_function__):  # fmt: skip
        raise NMError(
            f"{name} of shape {list(parameter.shape)} is quantised ({kind}): call {what} on the floating-point model, "
            "and quantise what it gives back"
        )


def _check_devices(model: nn.Module, what: str) -> None:
    """All state on one device: a graph that copies between devices cannot be moved as one."""
    homes: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        homes.setdefault(tensor.device, name)
    if len(homes) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in homes.items())
        raise NMError(f"this {type(model).__name__} lies on several devices: {places}. Move it to one before {what}")


def _check_meta(model: nn.Module, inputs: Any, what: str) -> None:
    """A model without values can be looked at with inputs without values."""
    first = next(((name, p) for name, p in model.named_parameters() if p.is_meta), None)
    if first is not None and any(isinstance(leaf, Tensor) and not leaf.is_meta for leaf in pytree.tree_leaves(inputs)):
        raise NMError(
            f"{first[0]} of shape {list(first[1].shape)} is on the meta device and the inputs are not: for a plan without "
            f"values make the inputs there too, else model.to_empty(device=...) and load weights before {what}"
        )


def _normal(example: Tensor) -> Tensor:
    return example.clone() if example.is_inference() else example  # an inference tensor cannot be traced for training


def _arguments(example_inputs: Any, kwargs: Mapping[str, Any] | None, what: str) -> tuple[Any, ...]:
    if example_inputs is None and not kwargs:
        raise NMError(
            f"{what}(model, example_inputs): give inputs to capture the model with, such as (x,). "
            "Working without them, through TorchDynamo, is not in this release"
        )
    if example_inputs is None:
        return ()
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def _where(marked: list[str]) -> str:
    return f" (its submodule {marked[0]!r} owns N:M weights)" if marked and marked[0] else ""
