"""Progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nm_compiler.demo.train import Progress

if TYPE_CHECKING:
    from rich.console import Console

_QUIET = 20.0  # seconds between lines where there is no terminal


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """What `run` is to call after every step, shown on ``console``."""
    if not console.is_terminal:
        yield _lines(console)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, note: bar.update(task, completed=done, total=total, description=note)


def _lines(console: Console) -> Progress:
    begin = last = time.monotonic()

    def line(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _QUIET or done == total:
            last = now
            console.print(f"{note}: {done / total:.0%} of all steps, {now - begin:.0f} s", highlight=False)

    return line
