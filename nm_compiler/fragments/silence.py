"""What torch says, while a model runs under TorchDynamo here, of its own workings: no news to who trains the model.

A graph break is what a carrier of fragments is for, and an op that fails comes back as an error with its line.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_EXPECTED = {
    "torch._dynamo.variables.tensor": "Graph break from `Tensor.item()`",
    "torch._subclasses.fake_tensor": "failed while attempting to run meta for",
}
"""Loggers, and how those of their messages begin that are left out."""


class _Expected(logging.Filter):
    """Leaves one message out, of this thread, unless more is asked for than warnings (``TORCH_LOGS=dynamo``)."""

    def __init__(self, logger: logging.Logger, begin: str) -> None:
        super().__init__()
        self.logger, self.begin, self.thread, self.hit = logger, begin, threading.get_ident(), False

    def filter(self, record: logging.LogRecord) -> bool:
        if (
            self.logger.isEnabledFor(logging.INFO)
            or record.thread != self.thread
            or not str(record.msg).startswith(self.begin)
        ):
            return True
        self.hit = True
        return False


@contextlib.contextmanager
def expected() -> Iterator[None]:
    """Without the messages that are expected here; all others, and those of models of other threads, are as they were."""
    filters = [_Expected(logging.getLogger(name), begin) for name, begin in _EXPECTED.items()]
    for each in filters:
        each.logger.addFilter(each)
    try:
        yield
    finally:
        for each in filters:
            each.logger.removeFilter(each)
        if filters[0].hit:
            _tell_again()


def _tell_again() -> None:
    """torch says it once a process: not for this model, so still for another that the user compiles."""
    from torch._dynamo.variables.tensor import TensorVariable

    clear = getattr(getattr(TensorVariable, "_warn_capture_scalar_outputs", None), "cache_clear", None)
    if clear is not None:
        clear()
