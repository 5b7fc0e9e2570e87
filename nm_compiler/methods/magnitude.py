"""One-shot magnitude pruning (ASP; Mishra et al., 2021): choose the masks once, then fine-tune under them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from nm_compiler.graph import Pass
from nm_compiler.importance import Importance, importance_of
from nm_compiler.layout import as_groups
from nm_compiler.methods.base import Method
from nm_compiler.passes.insert_fixed_masks import insert_fixed_masks
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.combinations import pack, unpack
from nm_compiler.solvers.magnitude import magnitude_mask


@dataclass(frozen=True, slots=True)
class Magnitude(Method):
    """Keep the N largest magnitudes that each group has when the model is compiled; the masks never change.

    The mask is kept as one bit a weight, so pruned weights may drift under weight decay without coming back.
    importance: what to keep instead of magnitude, as a rule such as `nm.Wanda` or tensors by parameter name.
    """

    importance: Importance | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The method, and what it goes by."""
        given = self.importance
        kind = "given" if isinstance(given, Mapping) else getattr(given, "__qualname__", repr(given))
        return self.name + "()" if given is None else f"{self.name}(importance={kind})"

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        return [partial(insert_fixed_masks, sites=sites)]

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        mask = magnitude_mask(importance_of(self.importance, site, weight), site.pattern.n, site.pattern.m, site.in_axis)
        return {"mask": pack(mask.flatten(1))}

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return ("mask",)

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        kept = as_groups(unpacked(state["mask"], site), site.rows, site.pattern.m).sum(-1)
        exact = bool((kept == site.pattern.n).all())
        return None if exact else f"the mask does not keep exactly {site.pattern.n} of every {site.pattern.m}"


def unpacked(bits: Tensor, site: Site) -> Tensor:
    """The mask of a weight, bool of its shape, from the bits that are kept beside it."""
    return unpack(bits, math.prod(site.shape[1:])).reshape(site.shape)
