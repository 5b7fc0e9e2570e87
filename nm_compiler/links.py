"""Where the layers of a model lie and how they are set: what was changed after `nm.compile` is found out at the next call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from nm_compiler.errors import NMError

_SET: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.dropout._DropoutNd: ("p",), nn.modules.batchnorm._NormBase: ("momentum",), nn.MultiheadAttention: ("dropout",),
}  # fmt: skip
Setting = tuple[dict[str, Any], str, Any, str]
"""The attributes of a module, the name of one of them, what it was when the model was captured, and the module's path."""
Link = tuple[dict[str, nn.Module | None], str, nn.Module | None, str]
"""The children of a module, the name of one of them, which module it is, and its path from the root."""


def links(root: nn.Module, names: Iterable[str]) -> Iterator[Link]:
    """Every step from the root to the owners of the weights ``names``: where a module lies, and which it is."""
    seen = set()
    for name in names:
        atoms, module = name.split(".")[:-1], root
        for depth, atom in enumerate(atoms):
            path, parent = ".".join(atoms[: depth + 1]), module
            module = parent._modules[atom]  # type: ignore[assignment]
            if path not in seen:
                seen.add(path)
                yield parent._modules, atom, module, path


def settings(root: nn.Module) -> Iterator[Setting]:
    """What trainers change between steps, and a captured graph holds as a number: dropouts and momenta of batch norms."""
    for path, module in root.named_modules():
        names = [name for kind, names in _SET.items() if isinstance(module, kind) for name in names]
        for name in (*names, "drop_prob"):  # the latter of timm's and Hugging Face's layers
            if name in module.__dict__:
                yield module.__dict__, name, module.__dict__[name], path


def owner_at(root: nn.Module, path: str) -> nn.Module:
    """The module at ``path``. Raises NMError if there is none any more."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise replaced(path) from None


def replaced(path: str, why: str = "its weights have no state and would run dense") -> NMError:
    """What to say of a layer at ``path`` that is another one now."""
    return NMError(
        f"{path} was replaced after nm.compile: {why}. Put the layer back (peft's unload() does), and replace layers or add "
        "adapters before nm.compile, or after nm.freeze"
    )
