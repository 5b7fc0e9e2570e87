"""The state of a weight: registered beside it, on the module that owns it, named after the parameter.

<param>_scores   Parameter   LBC: the weight's shape (by position) or [out, groups per row, C]
<param>_live     uint8       LBC: [out, groups per row, ceil(C / 8)], [.., C] or [.., M]
<param>_order    int64       Bi-Mask: [out]
<param>_mask     uint8       fixed masks: [size of axis 0, ceil(rest / 8)], one bit a weight
nm_recipe        uint8       on the root: what the state belongs to (method, layout, patterns), as JSON text

Where a weight holds several, such as experts [expert, out, in] or [expert, in, out], [out, ..] is [expert, out, ..]: the
state can then be sharded along its leading axis together with the weight, by FSDP2 once integers are parameters without
gradient as well (`nm_compiler.integrations.fsdp`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.sites.plan import Site
from nm_compiler.state.sharding import whole, write

RECIPE = "nm_recipe"


@dataclass(frozen=True, slots=True)
class Weight:
    """A planned weight on its model: the parameter and the state beside it, always read afresh."""

    site: Site
    model: nn.Module

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.model.get_submodule(self.site.name.rpartition(".")[0])

    @property
    def leaf(self) -> str:
        """The parameter's name on its owner, such as ``weight``."""
        return self.site.name.rpartition(".")[2]

    @property
    def param(self) -> nn.Parameter:
        """The weight itself."""
        found = self.owner._parameters.get(self.leaf)
        if found is None:
            raise gone(self.site.name)
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def value(self) -> Tensor:
        """The weight without gradient. Gathered where it is sharded: then every rank has to ask."""
        return whole(self.param.detach())

    def __getitem__(self, suffix: str) -> Tensor:
        """The state ``<param>_<suffix>``, maybe a shard of it. Raises NMError if the method gave the weight no such state."""
        found = getattr(self.owner, f"{self.leaf}_{suffix}", None)
        if found is None:
            raise NMError(
                f"{self.site.name} of shape {list(self.site.shape)} has no state {suffix!r}: only what the method's state() "
                "gives lies beside a weight"
            )
        assert isinstance(found, Tensor)
        return found

    def read(self, suffix: str) -> Tensor:
        """The state without gradient. Gathered where it is sharded: then every rank has to ask."""
        return whole(self[suffix].detach())

    def write(self, suffix: str, value: Tensor) -> None:
        """Copy ``value``, the same on all ranks, into the state."""
        write(self[suffix], value)


def gone(name: str) -> NMError:
    """What to say of a planned weight that its layer has no parameter for any more."""
    return NMError(
        f"{name} is no parameter of its layer any more, as where torch.nn.utils.prune or a parametrization has put another in "
        "its place, which has no mask: do that before nm.compile or after nm.freeze, or take it off again"
    )


def check_there(weights: Iterable[Weight]) -> None:
    """Raise NMError for a planned weight that is no parameter of its layer any more."""
    for weight in weights:
        _ = weight.param


def check_apart(weights: Iterable[Weight], suffixes: Callable[[Site], tuple[str, ...]]) -> None:
    """Raise NMError for two planned weights that became one tensor after they were planned, and have a mask each.

    suffixes: of the method; weights without state have no mask of their own.
    """
    seen: dict[int, str] = {}
    for weight in weights:
        first = seen.setdefault(id(weight.param), weight.site.name)
        if first != weight.site.name and suffixes(weight.site):
            raise NMError(
                f"{first} and {weight.site.name} of shape {list(weight.site.shape)} were tied after nm.compile: they are one "
                "tensor with a mask each. Tie them before nm.compile, or after nm.freeze"
            )


def learns(state: Tensor) -> TypeGuard[nn.Parameter]:
    """Whether an optimizer moves it. Integers may be parameters too, so that they are sharded, but get no gradient."""
    return isinstance(state, nn.Parameter) and state.is_floating_point()


MARK = "_nm_weights"  # on a module that owns planned weights: their names; state or none, it is compiled


def mark(model: nn.Module, sites: Iterable[Site]) -> None:
    """Note on every owner which of its weights are planned."""
    for site in sites:
        weight = Weight(site, model)
        weight.owner.__dict__.setdefault(MARK, set()).add(weight.leaf)


def unmark(model: nn.Module, sites: Iterable[Site]) -> None:
    """Take the notes off again."""
    for site in sites:
        Weight(site, model).owner.__dict__.pop(MARK, None)


def of_another(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Planned weights whose masks a compiled model around this one has. parts: paths of compiled models that lie in it."""
    inside = tuple(f"{path}." if path else "" for path in parts)
    return [
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in sorted(module.__dict__.get(MARK, ()))
        if not f"{path}.".startswith(inside)
    ]


def check_free(model: nn.Module, names: Iterable[str]) -> None:
    """Raise NMError if the model uses one of the ``names`` of state itself."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        if hasattr(model.get_submodule(path), leaf):
            raise NMError(f"the model has an attribute {name!r} of its own, a name this method needs: rename it")


def register(model: nn.Module, extras: Mapping[str, Tensor]) -> None:
    """Register state by full name; Parameters as parameters, the rest as persistent buffers.

    Raises NMError, nothing registered, if the model uses one of the names itself.
    """
    check_free(model, extras)
    for name, value in extras.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)


def unregister(model: nn.Module, names: Iterable[str]) -> None:
    """Take state off the model; a name that is not there is fine."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)


def write_recipe(method: Mapping[str, Any], sites: Iterable[Site]) -> Tensor:
    """The root tag: JSON text as uint8. method: name and layout, whatever decides the form of the state."""
    text = json.dumps({**method, "weights": {site.name: str(site.pattern) for site in sites}}, sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def read_recipe(tag: Tensor) -> dict[str, Any]:
    """The inverse of `write_recipe`. Raises NMError if the bytes are not such a tag."""
    try:
        recipe = json.loads(bytes(tag.cpu().tolist()).decode())
        return dict(recipe)
    except (ValueError, TypeError) as error:
        raise NMError(
            f"{RECIPE!r} in this state_dict is damaged ({error}): save the checkpoint again; an average of state_dicts takes "
            "the mean of what is_floating_point(), and copies the rest"
        ) from error
