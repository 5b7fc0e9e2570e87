"""Run a function over many inputs, each in a process of its own, forked from one that has imported everything.

What a process yields is kept as it comes: a crash or a timeout loses only what was not known yet.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Row = dict[str, Any]
Input = TypeVar("Input")


@dataclass
class _Running:
    process: BaseProcess
    pipe: Connection
    deadline: float
    what: Any
    row: Row = field(default_factory=dict)


def each(
    measure: Callable[[Input], Iterator[Row]], inputs: Iterable[Input], *, jobs: int, timeout: float
) -> Iterator[tuple[Input, Row]]:
    """(input, row) for every input, in the order in which they end; ``jobs`` at a time, ``timeout`` seconds each.

    A row joins all that ``measure`` yielded, ``error`` where it did not come to its end, and ``peak_mib``, the memory that
    the process had at most, above what it started with.
    """
    fork = multiprocessing.get_context("fork")
    waiting, running = list(inputs)[::-1], list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            what = waiting.pop()
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(measure, what, there))
            process.start()
            there.close()
            running.append(_Running(process, here, time.monotonic() + timeout, what))
        ready = wait([one.pipe for one in running], timeout=1.0)
        for one in list(running):
            ended = _read(one) if one.pipe in ready else False
            if not ended and time.monotonic() > one.deadline:
                one.process.kill()
                one.row["error"], ended = f"no result within {timeout:.0f} s", True
            if ended:
                one.process.join()
                if one.process.exitcode and "error" not in one.row:
                    one.row["error"] = f"its process ended with {one.process.exitcode}"
                running.remove(one)
                yield one.what, one.row


def _read(one: _Running) -> bool:
    """Take what was sent; whether that was all."""
    try:
        one.row.update(one.pipe.recv())
    except EOFError:
        return True
    return False


def _child(measure: Callable[[Input], Iterator[Row]], what: Input, pipe: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for part in measure(what):
            pipe.send(part)
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]})
    pipe.send({"peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024})
    pipe.close()
