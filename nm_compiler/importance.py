"""What one-shot masks and order searches should keep: magnitude, or a rule that knows the inputs of every weight.

    stats  = nm.calibrate(model, loader)                                            # what every weight is multiplied with
    sparse = nm.compile(model, (x,), method=nm.Magnitude(importance=nm.Wanda(stats)))
    nm.permute(model, (x,), importance=nm.Wanda(stats))

A rule is a function of a `Site` and its weight that returns a tensor of the weight's shape, not negative.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nm_compiler.calibration import Calibration
from nm_compiler.errors import NMError
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.importance import ria, saliency, wanda
from nm_compiler.untouched import untouched

Rule = Callable[[Site, Tensor], Tensor]
Importance = Mapping[str, Tensor] | Rule


@dataclass(frozen=True, slots=True)
class Wanda:
    """Magnitude times the norm of the input. inputs: from `nm_compiler.calibrate`. Ref: Sun et al., ICLR 2024."""

    inputs: Mapping[str, Tensor] = field(repr=False)

    def __call__(self, site: Site, weight: Tensor) -> Tensor:
        """Of the weight's shape. Raises NMError for a weight whose inputs were not seen, or were in another order."""
        return wanda(weight, _inputs(self.inputs, site, weight))


@dataclass(frozen=True, slots=True)
class RIA:
    """Magnitude relative to its row and its column, times a power of the norm of the input. Ref: Zhang et al., ICLR 2024.

    inputs: from `nm_compiler.calibrate`; power: of the norm, 0.5 in the paper.
    """

    inputs: Mapping[str, Tensor] = field(repr=False)
    power: float = 0.5

    def __call__(self, site: Site, weight: Tensor) -> Tensor:
        """Of the weight's shape. Raises NMError for a weight whose inputs were not seen, or were in another order."""
        out, batch = site.layout.out_axis, site.layout.batch
        row = [axis for axis in range(weight.ndim) if axis != out and axis not in batch]
        return ria(weight, _inputs(self.inputs, site, weight), out_axis=out, row_axes=row, power=self.power)


@dataclass(frozen=True, slots=True)
class Saliency:
    """Magnitude times gradient. gradients: by parameter name, such as ``{n: p.grad for n, p in model.named_parameters()}``."""

    gradients: Mapping[str, Tensor] = field(repr=False)

    def __call__(self, site: Site, weight: Tensor) -> Tensor:
        """Of the weight's shape. Raises NMError for a weight without a gradient."""
        return saliency(weight, _of(self.gradients, site, "gradients"))


def importance_of(importance: Importance | None, site: Site, weight: Tensor) -> Tensor:
    """What is kept of a weight: its magnitude where there is no importance, or a mapping without its name.

    Raises NMError that names the weight, for a rule that writes to it, for a shape that is not its own and for values that
    are not finite or negative.
    """
    if importance is None or (isinstance(importance, Mapping) and site.name not in importance):
        return weight.detach().abs()
    if not isinstance(importance, Mapping) and not callable(importance):
        raise NMError(
            f"importance={importance!r}: give nm.Wanda(nm.calibrate(model, loader)), nm.RIA(..), nm.Saliency(gradients), "
            "tensors by parameter name, or a function of a site and its weight"
        )
    if isinstance(importance, Mapping):
        given = importance[site.name]
    else:
        with untouched(
            weight, site.name, "importance=", "return a new tensor, as weight.abs() does and weight.abs_() does not"
        ):
            given = importance(site, weight)
    if not isinstance(given, Tensor):
        raise NMError(f"importance of {site.name} is a {type(given).__name__}: give a tensor of shape {list(weight.shape)}")
    if tuple(given.shape) != tuple(weight.shape):
        raise NMError(f"importance of {site.name} has shape {list(given.shape)}, the weight has {list(weight.shape)}")
    given = given.detach().to(weight.device)
    if given.numel() and not given.is_meta:
        low, high = (float(end) for end in torch.aminmax(given.float()))
        if not (low >= 0 and high < float("inf")):
            raise NMError(
                f"importance of {site.name} has NaN, infinite or negative entries: it says how much to keep, from 0 on"
            )
    return given


def check_names(importance: Any, model: nn.Module) -> None:
    """Raise NMError for tensors under a name that no parameter has: magnitude would decide in their place."""
    if not isinstance(importance, Mapping):
        return
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for stray in importance.keys() - set(names):
        near = difflib.get_close_matches(str(stray), names, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"its parameters have names such as {names[:1]}"
        raise NMError(f"importance= has {stray!r}, which is no parameter of this {type(model).__name__}: {meant}")


def _inputs(inputs: Mapping[str, Tensor], site: Site, weight: Tensor) -> Tensor:
    if isinstance(inputs, Calibration):
        inputs.check_order(site, weight)
    return _of(inputs, site, "inputs")


def _of(values: Mapping[str, Tensor], site: Site, what: str) -> Tensor:
    found = values.get(site.name)
    if found is None:
        raise NMError(
            f"{site.name} of shape {list(site.shape)} has no {what} here: were they taken from this model, in eval mode?"
        )
    return found
