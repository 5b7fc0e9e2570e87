"""Hugging Face: ``Trainer(model=sparse, callbacks=[SparsityCallback()])`` drives the masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nm_compiler.errors import NMError
from nm_compiler.integrations.schedules import Schedules, Write

if TYPE_CHECKING:

    class TrainerCallback:
        """Of transformers, which is not typed."""
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise NMError("this callback needs transformers: pip install transformers accelerate") from error


class SparsityCallback(TrainerCallback):
    """Steps the masks after every optimizer step of Hugging Face's Trainer; a resumed run goes on at the Trainer's step.

    The model is what `nm.compile` returned, or holds it; give the Trainer ``remove_unused_columns=False``, because it reads
    the arguments off ``forward``, which takes any, and ``label_names=["labels"]`` if it evaluates a captured model.

    every, write: send a row of `nm.Telemetry` to ``write`` every so many optimizer steps (see `writers`).
    Raises NMError at the start of the training if nothing is compiled.
    """

    def __init__(self, *, every: int | None = None, write: Write | None = None) -> None:
        self._every, self._write = every, write
        self.schedules: Schedules | None = None
        self._stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Find what is compiled; ``state.max_steps`` is how long the training is."""
        optimizer = getattr(given.get("optimizer"), "optimizer", given.get("optimizer"))  # accelerate wraps it
        known = [] if optimizer is None else [optimizer]
        self.schedules = Schedules(given["model"], state.max_steps, optimizers=known, every=self._every, write=self._write)
        if state.global_step:
            self.schedules.jump(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called once an optimizer step, however many batches it has, while gradients are still there to read."""
        assert self.schedules is not None
        self.schedules.step()
        self._stepped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The same for trainers that do not call `on_optimizer_step`: transformers before 4.45, and loops written after it."""
        if not self._stepped:
            self.on_optimizer_step(args, state, control, **given)
        self._stepped = False
