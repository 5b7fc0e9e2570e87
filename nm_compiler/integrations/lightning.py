"""Lightning: ``Trainer(callbacks=[SparsityCallback()])`` drives the masks of whatever is compiled in the LightningModule."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nm_compiler.errors import NMError
from nm_compiler.integrations.schedules import Schedules, Tracked, Write

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

    With several optimizers (manual optimization, as of a GAN) each compiled module steps with the one that moves its weights.

    total_steps: optimizer steps of the training, or of each compiled module by its name; Lightning's own estimate if left out.
    every, write: send a row of `nm.Telemetry` to ``write`` every so many optimizer steps (see `writers`).
    Raises NMError at the start of the fit if nothing is compiled, if the length cannot be told, or if another callback
    averages masks (``WeightAveraging``, ``EMAWeightAveraging``, which do unless ``use_buffers=False``).
    """

    def __init__(
        self, total_steps: int | Mapping[str, int] | None = None, *, every: int | None = None, write: Write | None = None
    ) -> None:
        self._total, self._every, self._write = total_steps, every, write
        self._saved: dict[str, Any] | None = None
        self._done = 0
        self._handles: list[Any] = []
        self.schedules: Schedules | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find what is compiled, and how long the training is. Raises NMError if Lightning does not know its length."""
        _check_averages(trainer.callbacks)
        if self._total is None and any(_changes(each) for each in trainer.callbacks):
            raise NMError(
                "Lightning estimates the length of a training as if gradients were accumulated over as many batches in all "
                "epochs as in the first: say SparsityCallback(total_steps=...)"
            )
        total = self._total if self._total is not None else trainer.estimated_stepping_batches
        if total in (-1, float("inf")):
            raise NMError("this training has no end that Lightning knows: say SparsityCallback(total_steps=...)")
        length = total if isinstance(total, Mapping) else int(total)
        self.schedules = Schedules(pl_module, length, optimizers=trainer.optimizers, every=self._every, write=self._write)
        if self._saved is not None and self._saved["schedules"]:  # empty in what a learning-rate finder saves before the fit
            self.schedules.load_state_dict(self._saved["schedules"])
            self._done = self._saved["done"]
        if len(trainer.optimizers) > 1:  # all of their steps are one number to Lightning
            for each in self.schedules.tracked:
                self._follow(self.schedules, each, each.optimizer or trainer.optimizers[0])

    def _follow(self, schedules: Schedules, each: Tracked, optimizer: torch.optim.Optimizer) -> None:
        self._handles.append(optimizer.register_step_post_hook(lambda *_: schedules.step_one(each)))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the optimizers."""
        while self._handles:
            self._handles.pop().remove()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step, once for each optimizer step: with accumulated gradients not after every batch."""
        assert self.schedules is not None
        while self._done < trainer.global_step:
            self._done += 1
            if not self._handles:
                self.schedules.step()

    def state_dict(self) -> dict[str, Any]:
        """Goes into Lightning's checkpoints."""
        return {"schedules": self.schedules.state_dict() if self.schedules else {}, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint; taken up when the fit starts."""
        self._saved = state_dict


def _changes(callback: Any) -> bool:
    """Whether it is a ``GradientAccumulationScheduler`` that has several numbers of batches."""
    scheduling = getattr(callback, "scheduling", None)
    return isinstance(scheduling, Mapping) and len(set(scheduling.values())) > 1


def _check_averages(callbacks: Sequence[Any]) -> None:
    """Raise NMError for an average of whole numbers: it would be validated, and kept in the end, with means of masks' bits."""
    for each in callbacks:
        if getattr(each, "_use_buffers", False):
            raise NMError(
                f"{type(each).__name__} averages buffers too, and masks are buffers of whole numbers, whose mean is no mask: "
                f"say {type(each).__name__}(use_buffers=False), which copies them"
            )
