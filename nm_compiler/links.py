"""Where the layers of a model lie and how they are set: what was changed after `nm.compile` is found out at the next call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.alone import DenseCall
from nm_compiler.capture.held import held, names_read
from nm_compiler.errors import NMError
from nm_compiler.graph import getattr_path
from nm_compiler.wording import several

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
Link = tuple[dict[str, nn.Module | None], str, nn.Module | None, str]
"""The children of a module, the name of one of them, which module it is, and its path from the root."""


class Layers:
    """The layers of a model as it was captured; `check` finds out at a call what is another now.

    links: of every layer; held: numbers, tensors and functions that are in the graphs; hooks: those of one kind of a module,
    how many there were, and which module that is; bare: parameters that layers do without; rooms: where layers may be added.
    """

    def __init__(self, root: nn.Module) -> None:
        self.links = list(links(root, [path for path, _ in root.named_modules()]))
        self.links += [(each._modules, key, None, _at(path, key)) for path, each, key in _left_out(root, "_modules")]
        self.bare = [(each._parameters, key, _at(path, key)) for path, each, key in _left_out(root, "_parameters")]
        self.rooms = [Room(each, path, len(each._modules)) for path, each in root.named_modules()]
        self.held = list(held(root))
        self.hooks = list(_hooks(root))
        self.forwards = [(each.__dict__, each.__dict__.get("forward"), path) for path, each in root.named_modules()]

    def check(self, *, exported: bool, training: bool) -> None:
        """Raise NMError for a layer that was replaced, as under adapters, or got or lost a hook, or holds another number.

        exported: one graph runs, and not fragments, which follow numbers.
        """
        for children, key, expected, path in self.links:
            if children.get(key) is not expected:
                why = "the captured graph knows nothing of the new layer"
                if expected is not None and getattr(children.get(key), "_orig_mod", None) is expected:
                    why = "torch.compile(sparse), of the whole model, is what compiles its graph"
                raise _added(path) if expected is None else replaced(path, why)
        for room in self.rooms:
            if len(room.module._modules) != room.children:
                room.look()
        for parameters, key, path in self.bare if exported else ():
            if parameters[key] is not None:
                raise _added(path)
        for own, patched, path in self.forwards if exported else ():
            if own.get("forward") is not patched:
                raise NMError(
                    f"forward() of {path or 'the model'} was replaced after nm.compile, which what was captured does not "
                    "follow: replace it before nm.compile or after nm.freeze"
                )
        for registered, captured, where in self.hooks:
            if len(registered) != captured:
                raise _hooked(where)
        for each in self.held if exported else ():
            if (training or not each.trains_only) and each.is_another():
                raise NMError(
                    f"{each.told()}: set it before nm.compile or after nm.freeze (where update_bn belongs); "
                    "nm.compile(model), without inputs, follows changes"
                )


@dataclass
class Room:
    """A layer, and how many there are below it; the captured graph knows nothing of what is added."""

    module: nn.Module
    path: str
    children: int

    def __post_init__(self) -> None:
        self.known = frozenset(self.module._modules)

    def look(self) -> None:
        """Raise NMError if forward() would call a layer that was added: a container's, or one that it reads by name.

        Others are nobody's business, as a loss that is kept beside the layers; they are not looked at again.
        """
        children = self.module._modules
        new = [name for name in children if name not in self.known]
        holds = isinstance(self.module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        read = names_read(type(self.module)) | {"parametrizations"}
        for name in new:
            if children[name] is not None and (holds or name in read):
                raise _added(_at(self.path, name))
        if all(children[name] is not None for name in new):
            self.children = len(children)


def _at(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _left_out(root: nn.Module, kind: str) -> Iterator[tuple[str, nn.Module, str]]:
    """The children or parameters that layers have a name for and do without, as a linear without a bias."""
    for path, module in root.named_modules():
        yield from ((path, module, name) for name, value in getattr(module, kind).items() if value is None)


def _added(path: str) -> NMError:
    return NMError(
        f"{path} was added after nm.compile: the captured graph knows nothing of it, and would do without. Add it before "
        "nm.compile or after nm.freeze; a model of nm.compile(model), without inputs, calls new layers, and leaves them dense"
    )


def links(root: nn.Module, paths: Iterable[str]) -> Iterator[Link]:
    """Every step from the root to the modules at ``paths``: where a module lies, and which it is."""
    seen = set()
    for path in filter(None, paths):
        atoms, module = path.split("."), root
        for depth, atom in enumerate(atoms):
            step, parent = ".".join(atoms[: depth + 1]), module
            if atom not in parent._modules:  # what torch.compile(layer) returns gives the children of the layer as its own
                why = "what stands there now has its layers elsewhere"
                if hasattr(parent, "_orig_mod"):
                    why += ", and torch.compile(layer) is not needed: nm.compile(model, then=...) compiles the calls"
                raise replaced(".".join(atoms[:depth]), why)
            module = parent._modules[atom]  # type: ignore[assignment]
            if step not in seen:
                seen.add(step)
                yield parent._modules, atom, module, step


def has_modes(module: nn.Module) -> bool:
    """Whether a layer may compute other things in training than in evaluation: all but torch's own that never ask which it is.

    Models may share one of those, as an activation that is the default of an argument; the mode of one is set by the other.
    """
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, DenseCall)]
    if before or module._forward_hooks or not type(module).__module__.startswith("torch.nn.modules."):
        return True  # the old spectral_norm's hook asks
    classes = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    methods = [value for kind in classes for value in vars(kind).values() if inspect.isfunction(value)]
    return any("training" in method.__code__.co_names for method in methods)


def _hooks(root: nn.Module) -> Iterator[tuple[dict[int, Callable[..., Any]], int, str]]:
    """What would be called around the layers: a captured graph has what they computed then, and calls none of them."""
    for path, module in root.named_modules():
        for kind in _HOOKS:
            registered = getattr(module, kind)
            yield registered, len(registered), f"{path or 'the model'} ({type(module).__name__})"


def check_hooks(root: nn.Module) -> tuple[str, ...]:
    """A note for the report on layers with forward hooks. Raises NMError for backward hooks: a graph would lose gradients."""
    noted = list[str]()
    for path, module in root.named_modules():
        told = f"{path or 'the model'} ({type(module).__name__})"
        if module._backward_hooks or module._backward_pre_hooks:
            raise NMError(
                f"{told} has a backward hook, which a captured graph does not call: remove it before nm.compile, or say "
                "nm.compile(model), without inputs, which calls all hooks"
            )
        called = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if any(not str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.") for hook in called):  # weight_norm, ..
            noted.append(told)
    if not noted:
        return ()
    return (f"Forward hooks of {several(noted, 3)}: what they compute is in the graph, which does not call them again.",)


def _hooked(where: str) -> NMError:
    """What to say of a module whose hooks are others than when it was captured."""
    return NMError(
        f"{where} got or lost a hook after nm.compile, which what was captured does not follow. Hooks on what nm.compile "
        "returned are called; on layers, register what computes something before nm.compile or after nm.freeze, return what "
        "others look at from forward(), or say nm.compile(model), without inputs, which calls all hooks"
    )


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


def resized(gm: GraphModule) -> NMError | None:
    """What to say of a parameter of another shape than when ``gm`` was captured, which its sizes may not fit."""
    for node in gm.graph.find_nodes(op="get_attr"):
        captured, now = node.meta.get("val"), getattr_path(gm, node.target)
        if isinstance(captured, Tensor) and isinstance(now, nn.Parameter) and captured.shape != now.shape:
            return NMError(
                f"{node.target} has shape {list(now.shape)}, and the graph was captured with {list(captured.shape)}: resize it"
                " (resize_token_embeddings() of Hugging Face's models) before nm.compile, or after nm.freeze"
            )
    return None
