"""S-STE (Hu et al., NeurIPS 2024): a soft threshold in the place of a mask, so that the weight in use changes continuously."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nm_compiler.graph import Pass
from nm_compiler.methods.base import Method
from nm_compiler.ops.define import weight_op
from nm_compiler.passes.insert_op import insert_op
from nm_compiler.sites.plan import Site


def soften(weight: Tensor, n: int, m: int, in_axis: int) -> Tensor:
    """S(W): every magnitude less the (n + 1)-th largest of its group, not below zero. Never more than n of m are left."""
    groups = weight.movedim(in_axis, -1).unflatten(-1, (-1, m))
    magnitudes = groups.abs()
    if n < m:
        magnitudes = (magnitudes - magnitudes.topk(n + 1, dim=-1).values[..., -1:]).clamp_min(0)
    soft: Tensor = (groups.sgn() * magnitudes).flatten(-2).movedim(-1, in_axis)
    return soft


@weight_op("nm::soft_weight", gradient=lambda g, weight, soft, scale, n, m, in_axis: g * scale)
def soft_weight(weight: Tensor, scale: Tensor, n: int, m: int, in_axis: int) -> Tensor:
    """scale * S(W), the gradient straight through the threshold: dW = scale * g."""
    return scale * soften(weight, n, m, in_axis)


@dataclass(frozen=True, slots=True)
class SSTE(Method):
    """Multiply with beta * S(W), the weights shrunk by the (N + 1)-th largest magnitude of their group: exactly N:M.

    beta is one number a weight, fixed at `compile`, that brings beta * S(W) nearest to W. Gradients go straight through
    to all weights. `freeze` writes beta * S(W). Ref: arXiv 2409.09099, without its estimator for gradients of activations.
    """

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        def options(site: Site) -> tuple[int, int, int]:
            return site.pattern.n, site.pattern.m, site.in_axis

        return [partial(insert_op, sites=sites, op=soft_weight, state=("scale",), options=options)]

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        wide = weight.float() if weight.dtype.itemsize < 4 else weight  # squares are beyond float16
        soft = soften(wide, site.pattern.n, site.pattern.m, site.in_axis)
        power = (soft * soft).sum()
        return {"scale": torch.where(power > 0, (wide * soft).sum() / power, 1.0).to(weight.dtype)}

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return ("scale",)

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        scale = float(state["scale"])
        return None if 0 < scale < float("inf") else f"the scale is {scale}, it must be a positive number"
