"""One-shot magnitude pruning (ASP; Mishra et al., 2021): choose the masks once, then fine-tune under them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nm_compiler.layout import out_axis_of
from nm_compiler.methods.base import Method
from nm_compiler.sites import Site
from nm_compiler.solvers.combinations import pack
from nm_compiler.solvers.magnitude import magnitude_mask


@dataclass(frozen=True, slots=True)
class Magnitude(Method):
    """Keep the N largest magnitudes that each group has when the model is compiled; the masks never change.

    The mask is kept as one bit a weight, so pruned weights may drift under weight decay without coming back.
    """

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        mask = magnitude_mask(weight, site.pattern.n, site.pattern.m, site.in_axis)
        assert out_axis_of(site.in_axis) in (0, 1)
        return {"mask": pack(mask.flatten(1))}
