"""What TensorRT says about sparsity while it builds: which layers could take a sparse kernel, and which did.

    TensorRT 8 to 10          (Sparsity) Layers eligible for sparse math: conv1, conv2
                              (Sparsity) TRT inference plan picked sparse implementation for layers: conv2
    later 10, and 11          (Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv1, conv2
                              (Sparsity) Chose 1 layer(s) using sparse tactics: conv2

The second wording gives the names in the verbose log only. Eligible means that the zeros were found; chosen means that
the sparse kernel won against the dense one when TensorRT timed both. Torch-TensorRT sends all of it to a Python logger.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LOGGER = "torch_tensorrt [TensorRT Conversion Context]"  # the same in torch_tensorrt 2.11 to 2.14

_ELIGIBLE = re.compile(r"\(Sparsity\) (?:Layers eligible\b[^:]*|Found (\d+)[^:]*)(?::(.*))?$", re.DOTALL)
_CHOSEN = re.compile(r"\(Sparsity\) (?:TRT inference plan picked\b[^:]*|Chose (\d+)[^:]*)(?::(.*))?$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SparsityLog:
    """Names of TensorRT's (fused) layers, and how many there are: a count can come without names.

    lines: every line about sparsity as TensorRT wrote it. None at all means that TensorRT said nothing, for instance
    because the engine came from a cache; it does not mean that nothing is sparse.
    """

    eligible: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    eligible_count: int = 0
    chosen_count: int = 0
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.lines:
            return "TensorRT said nothing about sparsity"
        names = f": {', '.join(self.chosen)}" if self.chosen else ""
        return f"TensorRT chose sparse kernels for {self.chosen_count} of {self.eligible_count} eligible layers{names}"


def parse(messages: Iterable[str]) -> SparsityLog:
    """Read the sparsity lines among ``messages``, of either wording; other lines are passed over.

    Each engine has a pair of lines. If TensorRT selects kernels for an engine again, the last pair counts; without
    names, engines cannot be told apart, and the last pair of all counts.
    """
    lines, pairs = [], list[_Pair]()
    for message in messages:
        if "(Sparsity)" not in message:
            continue
        lines.append(message.strip())
        if found := _ELIGIBLE.search(message):
            pairs.append(_Pair(*_read(found)))
        elif (found := _CHOSEN.search(message)) and pairs:
            pairs[-1].chosen, pairs[-1].chosen_count = _read(found)
    named = [pair for pair in pairs if pair.eligible]
    kept = [pair for i, pair in enumerate(named) if not any(set(pair.eligible) & set(p.eligible) for p in named[i + 1 :])]
    kept = kept or pairs[-1:]
    return SparsityLog(
        eligible=tuple(name for pair in kept for name in pair.eligible),
        chosen=tuple(name for pair in kept for name in pair.chosen),
        eligible_count=sum(pair.eligible_count for pair in kept),
        chosen_count=sum(pair.chosen_count for pair in kept),
        lines=tuple(lines),
    )


@contextmanager
def listening(logger: str, level: int, wanted: str = "") -> Iterator[list[logging.LogRecord]]:
    """Collect the records of ``logger`` from ``level`` on that contain ``wanted``; nobody sees more of them than before.

    The logger's level and filters are restored afterwards, whatever happens in between.
    """
    heard: list[logging.LogRecord] = []
    source = logging.getLogger(logger)
    own, shown = source.level, source.getEffectiveLevel()

    def hear(record: logging.LogRecord) -> bool:
        if record.levelno >= level and wanted in record.getMessage():
            heard.append(record)
        return record.levelno >= shown  # what the level that we lowered would have held back goes no further

    source.addFilter(hear)
    source.setLevel(min(level, shown))
    try:
        yield heard
    finally:
        source.removeFilter(hear)
        source.setLevel(own)


@dataclass(slots=True)
class _Pair:
    eligible: tuple[str, ...]
    eligible_count: int
    chosen: tuple[str, ...] = ()
    chosen_count: int = 0


def _read(found: re.Match[str]) -> tuple[tuple[str, ...], int]:
    count, names = found.groups()
    split = tuple(_split(names or ""))
    return split, int(count) if count else len(split)


def _split(names: str) -> Iterator[str]:
    """``a, PWN(b, c) + d`` is two layers: commas within brackets belong to a name."""
    depth, name = 0, ""
    for letter in names:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield from [name.strip()] * bool(name.strip())
            name = ""
        else:
            name += letter
    yield from [name.strip()] * bool(name.strip())
