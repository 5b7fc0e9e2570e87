"""Transposable masks (Hubara et al., NeurIPS 2021): one fixed mask that is N:M for the forward and the backward product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_compiler.importance import importance_of
from nm_compiler.layout import as_rows
from nm_compiler.methods.magnitude import Magnitude, unpacked
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.combinations import pack
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.transposable import transposable_mask
from nm_compiler.state.beside import Weight


@dataclass(frozen=True, slots=True)
class Transposable(Magnitude):
    """Choose masks once that are N:M along input and output channels, then fine-tune under them.

    In every M x M tile at most N of each row and of each column are kept, those with the largest sum of magnitudes: the
    weight and its transpose are both N:M, so y = x (W * T)^T and dx = g (W * T) can both use sparse products. It is what
    `Magnitude` is otherwise, ``importance`` and a bit a weight. A weight whose output channels do not divide by M is N:M
    forward only.
    """

    @property
    def backward_share(self) -> float:
        return 1.0

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        importance = importance_of(self.importance, site, weight)
        if site.backward_groups:
            mask = torch.empty(site.shape, dtype=torch.bool, device=weight.device)
            _tiled(mask, site).copy_(transposable_mask(_tiled(importance, site), pattern=site.pattern))
        else:
            mask = magnitude_mask(importance, site.pattern.n, site.pattern.m, site.in_axis)
        return {"mask": pack(mask.flatten(1))}

    def remark(self, weight: Weight) -> str | None:
        site = weight.site
        if site.backward_groups:
            return None
        return f"N:M forward only: {site.block} output channels in a block, not a multiple of {site.pattern.m}"

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        mask = _tiled(unpacked(state["mask"], site), site)
        for axis, there in ((-1, True), (-2, site.backward_groups)):
            groups = mask.movedim(axis, -1).unflatten(-1, (-1, site.pattern.m)) if there else mask[..., :0]
            if groups.numel() and int(groups.sum(-1).max()) > site.pattern.n:
                where = "input" if axis == -1 else "output"
                return f"the mask keeps more than {site.pattern.n} of {site.pattern.m} along the {where} channels"
        return None


def _tiled(weight: Tensor, site: Site) -> Tensor:
    """View a weight as ``[*batch, *taps, out, in]``: tiles lie in the last two axes."""
    return as_rows(weight, site.rows).movedim(len(site.layout.batch), -2)
