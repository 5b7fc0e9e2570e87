"""Lightning: ``Trainer(callbacks=[SparsityCallback()])`` drives the masks of whatever is compiled in the LightningModule."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nm_compiler.errors import NMError
from nm_compiler.integrations.schedules import Schedules, Write

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    try:  # the two packages have callbacks of their own: take that of the one in use
        if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise NMError("this callback needs Lightning: pip install lightning") from error


class SparsityCallback(Callback):
    """Steps the masks after every optimizer step, and goes on where a checkpoint was.

    Compile in the LightningModule, before its optimizers are made: ``self.net = nm.compile(net, (x,))`` in ``__init__``.

    total_steps: optimizer steps of the training; Lightning's own estimate if left out.
    every, write: send a row of `nm.Telemetry` to ``write`` every so many optimizer steps (see `writers`).
    Raises NMError at the start of the fit if nothing is compiled, or if the length cannot be told.
    """

    def __init__(self, total_steps: int | None = None, *, every: int | None = None, write: Write | None = None) -> None:
        self._total, self._every, self._write = total_steps, every, write
        self._saved: dict[str, Any] | None = None
        self._done = 0
        self.schedules: Schedules | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find what is compiled."""
        total = self._total if self._total is not None else trainer.estimated_stepping_batches
        if total in (-1, float("inf")):
            raise NMError("this training has no end that Lightning knows: say SparsityCallback(total_steps=...)")
        only = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        self.schedules = Schedules(pl_module, int(total), optimizer=only, every=self._every, write=self._write)
        if self._saved is not None:
            self.schedules.load_state_dict(self._saved["schedules"])
            self._done = self._saved["done"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step, once for each optimizer step: with accumulated gradients not after every batch."""
        assert self.schedules is not None
        while self._done < trainer.global_step:
            self._done += 1
            self.schedules.step()

    def state_dict(self) -> dict[str, Any]:
        """Goes into Lightning's checkpoints."""
        return {"schedules": self.schedules.state_dict() if self.schedules else {}, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint; taken up when the fit starts."""
        self._saved = state_dict
