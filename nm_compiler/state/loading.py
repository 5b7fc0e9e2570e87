"""What a state_dict must be to fit a compiled model, checked before anything is written.

recipe and state of the same method, layout and pattern     loaded as they are, once their values make sense
neither (a dense state_dict)                                 the weights it holds start with fresh state
anything else                                                NMError
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.methods.base import Method, state_of
from nm_compiler.sites.plan import Site
from nm_compiler.state.beside import RECIPE, Weight, learns
from nm_compiler.state.sharding import cut_like, whole

if TYPE_CHECKING:
    from nm_compiler.carrier import Carrier


def compare(carrier: Carrier, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise NMError where the recipes of a state_dict and of the compiled model differ."""
    if {k: v for k, v in theirs.items() if k != "weights"} != {k: v for k, v in ours.items() if k != "weights"}:
        raise NMError(
            f"this state_dict was trained with {_method_text(theirs)}, the model is compiled for {_method_text(ours)}: "
            "compile with the same method and layout, or load the dense weights only (nm.freeze, then state_dict)"
        )
    for name in {**theirs["weights"], **ours["weights"]}:
        there, here = theirs["weights"].get(name, "dense"), ours["weights"].get(name, "dense")
        if there != here:
            shape = list(carrier.plan.shapes.get(name, ()))
            raise NMError(
                f"{name} of shape {shape} is {there} in this state_dict and {here} in the compiled model: "
                "compile with the same pattern=, include= and exclude="
            )


def check_values(carrier: Carrier, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise NMError where the state has a wrong shape or values that the method cannot have made."""
    for weight in carrier.weights:
        state = {}
        for suffix in carrier.method.suffixes(weight.site):
            name = f"{weight.site.name}_{suffix}"
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or value.shape != weight[suffix].shape:
                found = "missing" if value is None else f"of shape {list(value.shape)}"
                raise NMError(f"{name} is {found} in this state_dict, {list(weight[suffix].shape)} is needed")
            state[suffix] = value if learns(weight[suffix]) else whole(value)
        problem = carrier.method.problem(weight.site, state)
        if problem:
            raise NMError(
                f"{weight.site.name} of shape {list(weight.site.shape)}: {problem}; this state_dict is damaged, or the mean "
                "of several, as in federated averaging: average what is_floating_point(), and copy the rest from one of them"
            )


def start_afresh(carrier: Carrier, state_dict: dict[str, Any], prefix: str) -> None:
    """Give a dense state_dict the fresh state of every weight it holds, under all names of its owner.

    Raises NMError, nothing changed, if it holds some state but not the recipe.
    """
    fresh = fresh_state(carrier, state_dict, prefix)
    stray = [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) in fresh]
    if stray:
        raise NMError(f"this state_dict has {stray[0]!r} but no {prefix + RECIPE!r}: save the whole state_dict again")
    owners = list(carrier.origin.named_modules(remove_duplicate=False))
    for weight in carrier.weights:
        if prefix + weight.site.name not in state_dict:
            continue
        for suffix in carrier.method.suffixes(weight.site):
            value = fresh[f"{weight.site.name}_{suffix}"]
            for path in (path for path, module in owners if module is weight.owner):
                state_dict[f"{prefix}{path}{'.' if path else ''}{weight.leaf}_{suffix}"] = value
            if learns(weight[suffix]):
                weight[suffix].requires_grad_(True)  # it learns again, whatever the schedule had settled


def keep_state(model: nn.Module, sites: Mapping[str, Site], method: Method, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a state_dict that knows nothing of the state of ``sites`` leave it as it is."""
    owners = list(model.named_modules(remove_duplicate=False))
    for weight in (Weight(site, model) for site in sites.values()):
        for path in (path for path, module in owners if module is weight.owner):
            for suffix in method.suffixes(weight.site):
                state_dict.setdefault(f"{prefix}{path}{'.' if path else ''}{weight.leaf}_{suffix}", weight[suffix])


def fresh_state(carrier: Carrier, values: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The state every weight would start with, by full name. values: weights to derive it from, where present."""
    fresh = {}
    for weight in carrier.weights:
        name = weight.site.name
        given = values.get(prefix + name)
        base = whole(given.detach()) if isinstance(given, Tensor) and given.shape == weight.param.shape else weight.value
        for suffix, value in state_of(carrier.method, weight.site, base).items():
            fresh[f"{name}_{suffix}"] = cut_like(value.detach(), weight[suffix])
    return fresh


def _method_text(recipe: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in recipe.items() if key not in ("method", "weights"))
    return f"{recipe.get('method')}({options})"
