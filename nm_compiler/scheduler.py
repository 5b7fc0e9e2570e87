"""SparsityScheduler: what happens to the masks between optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.memory import keep_freed
from nm_compiler.methods.base import Clock
from nm_compiler.optim import FirstStep, check_holds, drop_frozen, hooked_step, learned_state, rate_of, state_in
from nm_compiler.state.beside import check_apart
from nm_compiler.state.chosen import tell_stale
from nm_compiler.unwrapping import unwrap


class SparsityScheduler:
    """Like an ``lr_scheduler``: make it after `compile`, call ``step()`` after every ``optimizer.step()``, or `follow` one.

    It retires LBC's combinations, refreshes Bi-Mask's orders, and stops the training of scores at t_f. With gradient
    accumulation it counts optimizer steps, as an ``lr_scheduler`` does.

    model: what `compile` returned, also inside DDP or ``torch.compile``; total_steps: calls of ``step()`` to come;
    or epochs, alone (one call an epoch) or with steps_per_epoch (one call an optimizer step).
    optimizer: needed by methods whose decay is decoupled; what it remembers of scores is dropped when they stop learning (not
    under DDP, where they stay, nor from an optimizer with an ``eval()``, which may ask for it).
    From here on glibc keeps what a step frees for the next one (`nm_compiler.memory`): a compiled ResNet-50 with
    LBC else made 36,000 page faults a step.
    Raises NMError if the length is missing, given twice or not positive, if weights with a mask each were tied since,
    or if the optimizer lacks the scores. An optimizer that was not given and lacks them is found out in the first step; where
    scores have an optimizer of their own that steps later or less often than that of the weights, give that one.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        *,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._model = unwrap(model)
        self._named = str(self._model.method)
        self.total_steps = _length(total_steps, epochs, steps_per_epoch)
        if optimizer is not None:
            check_holds(optimizer, self._model)
        self._optimizer = optimizer
        self._looked, self._followed = optimizer is not None, False  # one that was given holds all that learns
        self.last_step, self._loads, self._broken = 0, -1, False
        keep_freed()
        tell_stale(self._model)
        self._begin()
        self._first = FirstStep(self._model)

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step and do what falls due, or fell due in one that broke off. Raises NMError past the end.

        Where the last one broke off, as by Ctrl-C, one more call does what it left, and counts nothing.
        """
        if self._model.frozen:
            raise NMError("the model was frozen: its masks are zeros in the weights now, there is nothing to schedule")
        if self.last_step >= self.total_steps and self._broken:
            self._model.method.catch_up(self._model.weights, self._clock())
            self._broken = False
            self._forget()
            return
        if self.last_step >= self.total_steps:
            raise NMError(
                f"step {self.last_step + 1} of {self.total_steps}: the schedule has ended; "
                "make SparsityScheduler(total_steps=...) as long as the training"
            )
        self._looked = self._looked or self._first.check()
        loads, self._loads = self._loads, -1  # should this be interrupted, the next step catches up
        self.last_step, self._broken = self.last_step + 1, True
        self._tell()
        weights, clock = self._model.weights, self._clock()
        self._model.method.advance(weights, clock)
        if loads != self._model.loads:
            self._model.method.catch_up(weights, clock)
        self._loads, self._broken = self._model.loads, False
        self._forget()

    def follow(self, optimizer: torch.optim.Optimizer) -> SparsityScheduler:
        """Step after every ``optimizer.step()`` from now on, whoever calls it; `step` needs no call then. Returns self.

        A step that a ``GradScaler`` skips is none. An earlier scheduler of the same model that follows the same optimizer, as
        of a loop that is begun once more, follows it no longer. Raises NMError if the optimizer lacks the scores, if this
        scheduler follows one already, or if it is a wrapper that calls no hooks.
        """
        if self._followed:
            raise NMError("this scheduler follows an optimizer already; a second one would count its steps twice")
        check_holds(optimizer, self._model)
        self._optimizer = optimizer
        hooks = hooked_step(optimizer)._optimizer_step_post_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Follows) and hook.scheduler._model is self._model]:
            del hooks[key]
        hooked_step(optimizer).register_step_post_hook(_Follows(self))
        self._followed = self._looked = True
        self._forget()
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on; the live sets and orders are in the model's own state_dict.

        Raises NMError if an option of the method has changed in training: a new process, which makes it anew, could not go on.
        """
        if str(self._model.method) != self._named:
            raise NMError(
                f"an option has changed since this scheduler was made, from {self._named} to {self._model.method}, which a "
                "new process that resumes would not know: options stay as they are. What changes is state beside weights "
                "(Method.state() and advance()), or goes by clock.step"
            )
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
                "depends on it, resume with the same length. If the training is to be longer or shorter from here on, load "
                f"{{**state, 'total_steps': {self.total_steps}}}: what is decided stays, what is left follows the new length"
            )
        if not 0 <= state_dict["last_step"] <= self.total_steps:
            raise NMError(f"last_step={state_dict['last_step']} lies outside 0 to {self.total_steps}")
        self.last_step = state_dict["last_step"]
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        self._loads, self._broken = -1, False  # the state may be behind the step, or be loaded next
        check_apart(self._model.weights, self._model.method.suffixes)
        self._model.method.begin(self._model.weights, self._clock())
        self._tell()
        self._forget()

    def _tell(self) -> None:
        self._model.__dict__["progress"] = self.last_step, self.total_steps  # a child of the model may have the name

    def _forget(self) -> None:
        if self._optimizer is not None:
            drop_frozen(self._optimizer, learned_state(self._model))

    def _clock(self) -> Clock:
        if self._optimizer is None:
            return Clock(self.last_step, self.total_steps, self._model.seed)
        known = partial(rate_of, self._optimizer), partial(state_in, self._optimizer)
        return Clock(self.last_step, self.total_steps, self._model.seed, *known)

    def __repr__(self) -> str:
        return f"SparsityScheduler(step {self.last_step} of {self.total_steps}, {self._model.method})"


@dataclass(frozen=True, eq=False)
class _Follows:
    """What an optimizer calls after each of its steps. A fused one is called where a `GradScaler` skips, and does nothing."""

    scheduler: SparsityScheduler

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not bool(skipped):
            self.scheduler.step()


def _length(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    if (total_steps is None) == (epochs is None):
        raise NMError("give either total_steps= or epochs= (with steps_per_epoch= if step() runs every optimizer step)")
    if total_steps is not None and steps_per_epoch is not None:
        raise NMError("steps_per_epoch= goes with epochs=, not with total_steps=")
    for name, value in (("total_steps", total_steps), ("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise NMError(f"{name}={value!r}: needs a whole number of at least 1")
    return total_steps if total_steps is not None else (epochs or 1) * (steps_per_epoch or 1)
