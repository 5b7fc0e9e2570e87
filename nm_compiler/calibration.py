"""What `nm_compiler.calibrate` returns: sums of squares of inputs, and whether they still fit the order of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.sites.plan import Site
from nm_compiler.streaming.statistics import save_norms


@dataclass(frozen=True)
class Calibration(Mapping[str, Tensor]):
    """By parameter name: the sums of squares of what each weight was multiplied with, float64, broadcastable to the weight.

    batches: how many of them it has seen; sums: of the weights' magnitudes then, by input channel: who was where.
    """

    squares: Mapping[str, Tensor]
    batches: int
    sums: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.squares[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.squares)

    def __len__(self) -> int:
        return len(self.squares)

    def save(self, path: str | Path) -> None:
        """Write the norms to a .safetensors file, for ``nm-compiler prune --statistics``. Raises NMError if that fails."""
        save_norms(self.squares, path)

    def __repr__(self) -> str:
        return f"Calibration({len(self)} weights, {self.batches} batches)"

    def check_order(self, site: Site, weight: Tensor) -> None:
        """Raise NMError if the input channels of a weight stand in another order now than when they were measured.

        Only where they are the very same channels: a weight that was trained on, or rounded, has others.
        """
        before = self.sums.get(site.name)
        if before is None or weight.is_meta:
            return
        now = sums_of(site, weight).to(before.device)
        if now.shape != before.shape or torch.allclose(now, before, rtol=1e-6, atol=0):
            return
        if torch.allclose(now.flatten().sort().values, before.flatten().sort().values, rtol=1e-10, atol=0):
            raise NMError(
                f"{site.name} of shape {list(site.shape)} has its input channels in another order than when they were "
                "measured: calibrate again after nm.permute, or leave the order to nm.compile(permute=), which minds them"
            )


def sums_of(site: Site, weight: Tensor) -> Tensor:
    """The magnitudes of a weight summed over its output channels: float64, moved as its input channels are."""
    return weight.detach().abs().sum(site.layout.out_axis, dtype=torch.float64)
