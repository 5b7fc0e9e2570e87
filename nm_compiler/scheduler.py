"""SparsityScheduler: what happens to the masks between optimizer steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.methods.base import Clock
from nm_compiler.module import unwrap


class SparsityScheduler:
    """Like an ``lr_scheduler``: make it after `compile`, call ``step()`` after every ``optimizer.step()``.

    It retires LBC's combinations, refreshes Bi-Mask's orders, and stops the training of scores at t_f. With gradient
    accumulation it counts optimizer steps, as an ``lr_scheduler`` does.

    model: what `compile` returned, also inside DDP or ``torch.compile``; total_steps: calls of ``step()`` to come;
    or epochs, alone (one call an epoch) or with steps_per_epoch (one call an optimizer step).
    Raises NMError if the length is missing, given twice or not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        *,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self._model = unwrap(model)
        self.total_steps = _length(total_steps, epochs, steps_per_epoch)
        self.last_step = 0
        self._begin()

    def step(self) -> None:
        """Count one optimizer step and do what falls due. Raises NMError past the end."""
        if self._model.frozen:
            raise NMError("the model was frozen: its masks are zeros in the weights now, there is nothing to schedule")
        if self.last_step >= self.total_steps:
            raise NMError(
                f"step {self.last_step + 1} of {self.total_steps}: the schedule has ended; "
                "make SparsityScheduler(total_steps=...) as long as the training"
            )
        self.last_step += 1
        self._model.method.advance(self._model.weights, self._clock())

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on; the live sets and orders are in the model's own state_dict."""
        return {"last_step": self.last_step, "total_steps": self.total_steps, "method": str(self._model.method)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Raises NMError, nothing changed, if it belongs to another schedule."""
        missing = {"last_step", "total_steps", "method"} - set(state_dict)
        if missing:
            raise NMError(f"this is not a SparsityScheduler state_dict: {', '.join(sorted(missing))} missing")
        if state_dict["method"] != str(self._model.method):
            raise NMError(f"saved for {state_dict['method']}, the model is compiled for {self._model.method}")
        if state_dict["total_steps"] != self.total_steps:
            raise NMError(
                f"saved with total_steps={state_dict['total_steps']}, this scheduler has {self.total_steps}: the schedule "
                "depends on it, resume with the same length"
            )
        if not 0 <= state_dict["last_step"] <= self.total_steps:
            raise NMError(f"last_step={state_dict['last_step']} lies outside 0 to {self.total_steps}")
        self.last_step = state_dict["last_step"]
        self._begin()

    def _begin(self) -> None:
        self._model.method.begin(self._model.weights, self._clock())

    def _clock(self) -> Clock:
        return Clock(self.last_step, self.total_steps, self._model.seed)

    def __repr__(self) -> str:
        return f"SparsityScheduler(step {self.last_step} of {self.total_steps}, {self._model.method})"


def _length(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    if (total_steps is None) == (epochs is None):
        raise NMError("give either total_steps= or epochs= (with steps_per_epoch= if step() runs every optimizer step)")
    if total_steps is not None and steps_per_epoch is not None:
        raise NMError("steps_per_epoch= goes with epochs=, not with total_steps=")
    for name, value in (("total_steps", total_steps), ("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise NMError(f"{name}={value!r}: needs a whole number of at least 1")
    return total_steps if total_steps is not None else (epochs or 1) * (steps_per_epoch or 1)
