"""Put the state of planned weights on a model, and take it off again.

before                          after
fc.weight     [out, in]         fc.weight           [out, in]      marked as planned on its owner
                                fc.weight_order     [out]          whatever the method keeps beside it
                                nm_recipe           uint8          what all of it belongs to
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nm_compiler.methods.base import Method, state_of
from nm_compiler.sites.plan import Plan
from nm_compiler.state.beside import RECIPE, Weight, mark, register, unmark, unregister, write_recipe


def attach_state(model: nn.Module, plan: Plan, method: Method) -> None:
    """Register the fresh state of all planned weights and the recipe. All or nothing: raises NMError before the first."""
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
