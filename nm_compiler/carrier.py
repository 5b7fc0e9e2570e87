"""What is common to both carriers: `SparseModule` (captured graphs) and `Prepared` (a live model under TorchDynamo)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.methods.base import Method
from nm_compiler.sites.plan import Plan
from nm_compiler.state.beside import Weight

CARRIER = "_nm_carrier"  # in the __dict__ of a live model: its `Prepared`


class Carrier(Protocol):
    """What schedulers, reports, telemetry and `nm.freeze` ask of a compiled model."""

    origin: nn.Module
    method: Method
    seed: int
    notes: tuple[str, ...]
    frozen: bool
    loads: int  # how many state_dicts were loaded
    progress: tuple[int, int] | None  # steps that a scheduler has counted, and of how many; None without one
    made_of: Mapping[str, int] | None  # how often each weight was written when its state was made; None of copies
    copy_known: Any  # None but of a copy, as an average of the weights is: `nm_compiler.state.averaged`

    @property
    def plan(self) -> Plan:
        """The weights that are N:M, and why the others are not."""

    @property
    def weights(self) -> list[Weight]:
        """The planned weights, in the model's order."""

    @property
    def late(self) -> Mapping[str, str]:
        """Weights that stay dense for a reason found after planning."""

    def ready(self) -> Sequence[Weight]:
        """The weights that can be frozen now. Raises NMError if no graph has been seen yet."""

    def runs(self, name: str) -> int | None:
        """How often the weight ran sparse, where that is counted."""

    def programs(self, training: bool | None = None) -> list[GraphModule]:
        """Rewritten graphs that together read every planned weight."""

    def text(self, training: bool) -> str:
        """The rewritten graph of a mode as a program."""

    def masked(self, name: str) -> tuple[Tensor, Tensor | None]:
        """What a planned weight is multiplied with now: forward, and backward under Bi-Mask."""

    def masked_parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by name, planned weights as their masks leave them."""

    def state_names(self) -> list[str]:
        """The names of everything that was registered on the model."""

    def retire(self) -> None:
        """The masks are in the weights now: this carrier is done."""


def carrier_of(module: Any) -> Any:
    """The `Prepared` of a live model, or None."""
    return module.__dict__.get(CARRIER) if isinstance(module, nn.Module) else None
