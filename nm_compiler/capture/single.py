"""A batch of one is captured as one of two: note where the model's own Python asks for the difference.

    if x.shape[0] == 1: ...      # torch.export takes it for False, whatever the batch, and guards nothing

What torch's own code asks of sizes, as whether they broadcast, its ops find out again whenever they run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch


@contextlib.contextmanager
def other_branches(libraries: tuple[str, ...]) -> Iterator[set[str]]:
    """The symbols of sizes that, at 1, would take another branch of code outside the folders ``libraries``."""
    found: set[str] = set()
    decide: Callable[[torch.SymBool], bool] = torch.SymBool.__bool__

    def noted(condition: torch.SymBool) -> bool:
        taken = decide(condition)
        if not sys._getframe(1).f_code.co_filename.startswith(libraries):
            expression = condition.node.expr
            symbols = expression.free_symbols
            if len(symbols) == 1 and expression.subs(dict.fromkeys(symbols, 1)) == (not taken):
                found.add(str(*symbols))
        return taken

    with patch.object(torch.SymBool, "__bool__", noted):
        yield found
