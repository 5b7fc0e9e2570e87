"""How calls of a live model reach its carrier: through ``Module._compiled_call_impl``, which `nn.Module.compile` sets too.

    model(x) ──► Entry ──► carrier.call(model, x) ──TorchDynamo──► model._call_impl(x) ──► fragments
    model.encoder(x), from outside ──► Entry of the encoder, likewise

Every module above a planned weight has an entry, so that a part that is called by itself, as `generate` calls an encoder,
does not run dense. Entries follow deepcopy and pickle, which drop ``_compiled_call_impl``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nm_compiler.errors import NMError
from nm_compiler.live.methods import install_methods, remove_methods
from nm_compiler.live.tracers import install_refusals, remove_refusals

if TYPE_CHECKING:
    from nm_compiler.live.prepared import Prepared

_ENTRY = "_nm_entry"  # where deepcopy and pickle find it


class Entry:
    """Runs a module through its carrier, or, inside the carrier, as it is."""

    def __init__(self, module: nn.Module, carrier: Prepared) -> None:
        self.module, self.carrier = module, carrier
        module.__dict__[_ENTRY] = module.__dict__["_compiled_call_impl"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result."""
        if self.carrier.is_inside():
            return self.module._call_impl(*args, **kwargs)
        return self.carrier.call(self.module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        carrier = copy.deepcopy(self.carrier, memo)
        return Entry(copy.deepcopy(self.module, memo), carrier)

    def __reduce__(self) -> tuple[Any, ...]:
        return Entry, (self.module, self.carrier)


def entered(module: nn.Module, args: Any) -> None:
    """A hook that finds nothing to do inside the carrier. Raises NMError where a call went past it.

    Without a hook TorchDynamo, compiling the code around, would itself go past ``_compiled_call_impl``. Where Python runs
    the hook, and not TorchDynamo, the code around is in parts.
    """
    if _ENTRY not in module.__dict__:
        _refuse_hooks_alone(module)
    carrier = module.__dict__[_ENTRY].carrier
    if not carrier.active:
        _refuse(module)
    if not torch.compiler.is_dynamo_compiling():
        carrier.live.met_in_parts()


def check_compiled(root: nn.Module, name: str) -> None:
    """Raise NMError if a module above the parameter ``name`` got a ``compile()`` of its own since its entry was made."""
    atoms = name.split(".")[:-1]
    for count in range(len(atoms) + 1):
        module = root.get_submodule(".".join(atoms[:count]))
        if _ENTRY in module.__dict__ and module.__dict__.get("_compiled_call_impl") is not module.__dict__[_ENTRY]:
            _refuse(module)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_hooks_alone(module: nn.Module) -> None:
    raise NMError(
        f"this {type(module).__name__} took the hooks of a layer that nm.compile had prepared, as the layers of "
        "torch.ao.quantization do, but not its masks, so its weights would be dense: make such layers before nm.compile, or "
        "after nm.freeze"
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse(module: nn.Module) -> None:
    module.__dict__["_compiled_call_impl"] = module.__dict__[_ENTRY]
    raise NMError(
        f"this {type(module).__name__} was prepared by nm.compile, and compile() on it now would run its weights dense: "
        "its calls are compiled already (nm.compile(model, then=...) says by what), so leave that line out"
    )


def install(carrier: Prepared, names: Iterable[str]) -> None:
    """Give the root and every module above one of the weights ``names`` an entry, and methods that multiply one by hand."""
    root, names = carrier.origin, list(names)
    paths = {""}
    for name in names:
        atoms = name.split(".")[:-1]
        paths.update(".".join(atoms[:count]) for count in range(1, len(atoms) + 1))
    for path in sorted(paths):
        module = root.get_submodule(path)
        if _ENTRY not in module.__dict__:
            Entry(module, carrier)
            module.register_forward_pre_hook(entered)
            install_refusals(module, root=module is root)
    install_methods(carrier, names)


def remove(root: nn.Module) -> None:
    """Take all entries off again."""
    for module in root.modules():
        remove_methods(module)
        remove_refusals(module)
        if _ENTRY not in module.__dict__:
            continue
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is entered]:
            handle = RemovableHandle(module._forward_pre_hooks)
            handle.id = key
            handle.remove()
        module.__dict__.pop("_compiled_call_impl", None)
        del module.__dict__[_ENTRY]  # last, so that what breaks off can be begun again
