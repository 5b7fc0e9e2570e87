"""Which outputs of a model must keep their order.

An output that matters pins its axes. Others, such as the hidden states that Hugging Face models return beside their logits,
stay right up to the order of their channels, and do not hold the residual stream in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch.utils import _pytree as pytree

from nm_compiler.errors import NMError

Outputs: TypeAlias = "int | str | Sequence[int | str] | Callable[[Any], Any] | None"

_MATTER = ("logits", "loss", "pred_", "scores", "reconstruction", "prediction")
_BESIDE = ("hidden_state", "attentions", "past_key_values", "cache", "intermediate", "states")


class _Marker:
    """Stands for one tensor of the outputs while a user's function chooses among them."""

    def __init__(self, index: int) -> None:
        self.index = index


def chosen(specs: Sequence[pytree.TreeSpec], outputs: Outputs) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Names and flat indices of the outputs that matter, per captured mode.

    outputs: None: those called logits, loss or prediction where a model names its outputs and has such, else all but hidden
    states, attentions and caches, else all; an index; a name; several of them; or a function that takes the outputs' structure
    and returns the ones that matter. Raises NMError for an index, a name or a function that fits no mode.
    """
    named = [_named(spec) for spec in specs]
    if callable(outputs):
        return [_by_function(spec, names, outputs) for spec, names in zip(specs, named, strict=True)]
    if outputs is None:
        return [_picked(names, _default(names)) for names in named]
    wanted = [outputs] if isinstance(outputs, (int, str)) else list(outputs)
    for each in wanted:
        if not any(_match(names, each) for names in named):
            known = ", ".join(dict.fromkeys(name or str(i) for names in named for i, (name, _) in enumerate(names)))
            raise NMError(f"outputs={each!r} is none of the model's outputs; it returns {known}")
    result = []
    for names in named:
        picked = sorted({index for each in wanted for index in _match(names, each)})
        result.append(_picked(names, picked or range(len(names))))  # a mode that lacks the name returns something else
    return result


def _named(spec: pytree.TreeSpec) -> list[tuple[str, str]]:
    """The first key of every leaf's path, and the whole path."""
    structure = pytree.tree_unflatten([_Marker(i) for i in range(spec.num_leaves)], spec)
    paths = list(_leaves(structure))
    assert [leaf.index for _, leaf in paths] == list(range(spec.num_leaves))
    return [(_key(path[0]) if path else "", pytree.keystr(path)) for path, _ in paths]


def _leaves(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """As `tree_leaves_with_path`, also of classes that were registered without a function for their keys."""

    def below(node: Any) -> bool:
        return node is not tree

    try:
        found = pytree.tree_leaves_with_path(tree, is_leaf=below)
    except ValueError:  # torch finds no keys
        children = pytree.tree_leaves(tree, is_leaf=below)
        held: Mapping[Any, Any] = tree if isinstance(tree, Mapping) else getattr(tree, "__dict__", {})
        names: dict[int, Any] = {id(value): pytree.MappingKey(name) for name, value in held.items()}
        found = [((names.get(id(child), pytree.SequenceKey(i)),), child) for i, child in enumerate(children)]
    for path, child in found:
        if path:
            yield from _leaves(child, (*before, *path))
        else:
            yield before, child


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _default(names: Sequence[tuple[str, str]]) -> Sequence[int]:
    if all(not name or name.isdigit() for name, _ in names):
        return range(len(names))
    matter = [i for i, (name, _) in enumerate(names) if any(word in name for word in _MATTER)]
    return matter or [
        i for i, (name, _) in enumerate(names) if not any(w in name for w in _BESIDE) or name == "last_hidden_state"
    ]


def _match(names: Sequence[tuple[str, str]], wanted: int | str) -> list[int]:
    if isinstance(wanted, str):
        return [i for i, name in enumerate(names) if wanted in name]
    order = list(dict.fromkeys(name for name, _ in names))
    return [i for i, (name, _) in enumerate(names) if -len(order) <= wanted < len(order) and name == order[wanted]]


def _picked(names: Sequence[tuple[str, str]], indices: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    labels = [names[i][0] if len({n for n, _ in names}) > 1 or not names[i][0].isdigit() else "" for i in indices]
    return tuple(f"output {label}" if label.isdigit() else label for label in labels), tuple(indices)


def _by_function(
    spec: pytree.TreeSpec, names: Sequence[tuple[str, str]], function: Callable[[Any], Any]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    structure = pytree.tree_unflatten([_Marker(i) for i in range(spec.num_leaves)], spec)
    try:
        leaves = pytree.tree_leaves(function(structure))
    except Exception as error:
        raise NMError(
            f"outputs={function!r} could not choose from the model's outputs: {type(error).__name__}: {error}"
        ) from error
    if not leaves or not all(isinstance(leaf, _Marker) for leaf in leaves):
        raise NMError("outputs= as a function takes the model's outputs and returns some of them, unchanged")
    return _picked(names, sorted({leaf.index for leaf in leaves}))
