"""Put the state of planned weights on a model, and take it off again; before that, see whether the weights can have it.

before                          after
fc.weight     [out, in]         fc.weight           [out, in]      marked as planned on its owner
                                fc.weight_order     [out]          whatever the method keeps beside it
                                nm_recipe           uint8          what all of it belongs to
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.importance import check_names
from nm_compiler.methods.base import Method, state_of
from nm_compiler.sites.plan import Plan, Site
from nm_compiler.state.beside import RECIPE, Weight, mark, register, unmark, unregister, write_recipe


def attach_state(model: nn.Module, plan: Plan, method: Method) -> None:
    """Register the fresh state of all planned weights and the recipe. Raises NMError before the first.

    `detach_state` makes good what is broken off, as by Ctrl-C, if `check_free` was asked before.
    """
    extras: dict[str, Tensor] = {}
    for site in plan.sites:
        for suffix, value in state_of(method, site, Weight(site, model).value).items():
            extras[f"{site.name}_{suffix}"] = value
    extras[RECIPE] = recipe_tag(model, plan, method)
    register(model, extras)
    mark(model, plan.sites)


def detach_state(model: nn.Module, plan: Plan, method: Method) -> None:
    """Take the state and the marks off the model again."""
    unregister(model, state_names(plan, method))
    unmark(model, plan.sites)


def state_names(plan: Plan, method: Method) -> list[str]:
    """The full names of everything that `attach_state` registers."""
    return [*(f"{site.name}_{suffix}" for site in plan.sites for suffix in method.suffixes(site)), RECIPE]


def recipe_tag(model: nn.Module, plan: Plan, method: Method) -> Tensor:
    """The recipe of the planned weights, uint8, where the model's parameters are."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return write_recipe(method.layout(), plan.sites).to(device)


def check_weights(model: nn.Module, sites: Collection[Site], method: Method) -> None:
    """Raise NMError for a weight that the method cannot take, or whose values it could not compare."""
    check_names(getattr(method, "importance", None), model)
    check_finite({site.name: model.get_parameter(site.name) for site in sites})
    for site in sites:
        method.check(site)


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise NMError for NaN and infinite values. weights: by name; those on the meta device have no values to look at."""
    for name, weight in weights.items():
        if weight.is_meta:
            continue
        extremes = torch.stack(torch.aminmax(weight.detach())) if weight.numel() else weight.new_zeros(2)
        if not bool(torch.isfinite(extremes).all()):  # NaN wins both; a mask of the whole weight would cost memory
            wrong = int((~torch.isfinite(weight.detach())).sum())
            raise NMError(
                f"{name} of shape {list(weight.shape)} has {wrong} NaN or infinite values: magnitudes cannot be compared; "
                "load a healthy checkpoint or lower the learning rate"
            )
