"""No sparse kernels: the plain graph, batch norms folded, with the reason why for every weight."""

from __future__ import annotations

import torch

from nm_compiler.graph import run
from nm_compiler.passes.left_products import left_products
from nm_compiler.runtime.backends.base import Backend, Job, Result
from nm_compiler.runtime.products import Decision


class Dense(Backend):
    """Runs everywhere."""

    name = "dense"
    later = True

    def __init__(self, reason: str = 'backend="dense" was asked for', hint: str = "") -> None:
        self._reason, self._hint = reason, hint

    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def lower(self, job: Job) -> Result:
        self.take(job)
        found = job.products
        decisions = {each.node: Decision(reasons=(self._reason,), hint=self._hint) for each in found}
        return Result(run(job.gm, [left_products]), decisions, found)
