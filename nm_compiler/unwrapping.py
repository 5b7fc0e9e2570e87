"""Find the carrier of a compiled model inside what was put around it: DDP, an averaged model, ``torch.compile``, Fabric.

A wrapper has the model as its ``module``, and no parameters beside those of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nm_compiler.carrier import Carrier, carrier_of
from nm_compiler.errors import NMError
from nm_compiler.module import SparseModule
from nm_compiler.state.averaged import WAY_OUT
from nm_compiler.state.beside import RECIPE


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `nm.compile` gives: a `SparseModule`, or a live model."""
    return isinstance(module, SparseModule) or carrier_of(module) is not None


def unwrap(model: Any) -> Carrier:
    """The carrier inside DDP, an averaged model or ``torch.compile``. Raises NMError if there is none, or if its
    integer state was averaged.
    """
    carrier = carrier_in(model)
    if carrier is None:
        raise NMError(_no_carrier(model))
    return carrier


def carrier_in(model: Any) -> Carrier | None:
    """`unwrap`, or None where there is none."""
    inner, averaged = model, False
    while not isinstance(inner, SparseModule) and carrier_of(inner) is None:
        averaged = averaged or bool(getattr(inner, "use_buffers", False))
        inner = inner._modules.get("_orig_mod", _wrapped(inner)) if isinstance(inner, nn.Module) else None
        if inner is None:
            return None
    carrier: Carrier = inner if isinstance(inner, SparseModule) else carrier_of(inner)
    if averaged and not carrier.frozen:
        _check_not_averaged(carrier)
    return carrier


def _wrapped(wrapper: nn.Module) -> nn.Module | None:
    """The ``module`` of what only wraps one; FSDP1, which flattens its parameters, does more."""
    module = getattr(wrapper, "module", None)
    if not isinstance(module, nn.Module) or module is wrapper or hasattr(wrapper, "_fsdp_wrapped_module"):
        return None
    own = {id(parameter) for parameter in module.parameters()}
    return module if all(id(parameter) in own for parameter in wrapper.parameters()) else None


def compiled_parts(model: nn.Module) -> dict[str, Carrier]:
    """The carriers of the outermost compiled submodules, by name."""
    found: dict[str, Carrier] = {}
    for name, module in model.named_modules():
        if is_compiled(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = unwrap(module)
    return found


def _check_not_averaged(module: Carrier) -> None:
    buffers = dict(module.origin.named_buffers())
    state = [name for name in module.state_names() if name in buffers and name != RECIPE]
    if state:
        raise NMError(f"{state[0]} is of whole numbers. {WAY_OUT}")


def _no_carrier(model: Any) -> str:
    kind = type(model).__name__
    inside = list(compiled_parts(model)) if isinstance(model, nn.Module) else []
    if inside and hasattr(model, "_fsdp_wrapped_module"):
        return (
            f"{kind} of torch.distributed.fsdp flattens weights, and groups are lost in that. Leave it out, and shard "
            "what nm.compile(model) without example inputs returns with fully_shard (FSDP2), after its first call"
        )
    if inside:
        return f"{kind} is not a compiled model itself, but its submodule {inside[0]!r} is: pass that one"
    return f"{kind} is not a compiled model: call nm.compile(model, example_inputs) first"
