"""Text that every Python has: the sources of its own standard library, top-level modules only, one symbol a character."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import nm_compiler as nm

SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
"""Newline and printable ASCII. Whatever else occurs, accents and tabs, counts as a question mark."""
HELD_OUT = (
    "argparse.py", "calendar.py", "configparser.py", "csv.py", "fractions.py", "gzip.py",
    "heapq.py", "selectors.py", "statistics.py", "textwrap.py", "traceback.py", "uuid.py",
)  # fmt: skip
"""Never trained on. They are modules of one file in all Pythons from 3.11 on."""


@dataclass(frozen=True, slots=True)
class Text:
    """Symbols as uint8 ``[characters]``, indices into `SYMBOLS`. digest: of both parts, they differ between Pythons."""

    train: Tensor
    held: Tensor
    digest: str

    def to(self, device: torch.device) -> Text:
        """The same text on a device."""
        return Text(self.train.to(device), self.held.to(device), self.digest)

    def batches(self, steps: int, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows from random places, the same ones for a seed: int64 ``[batch, context]``, and what follows each symbol."""
        generator = torch.Generator().manual_seed(seed)
        within = torch.arange(context + 1)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - context, (batch, 1), generator=generator)
            yield _asked(self.train[(starts + within).to(self.train.device)])

    def windows(self, count: int, context: int) -> Tensor:
        """Up to ``count`` windows ``[.., context + 1]`` of held-out text, evenly spaced, no character asked for twice."""
        count = min(count, (len(self.held) - 1) // context)
        starts = torch.arange(count) * ((len(self.held) - 1 - context) // max(1, count - 1))
        return self.held[(starts[:, None] + torch.arange(context + 1)).to(self.held.device)]


def _asked(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Symbols and, flat, the next ones."""
    return windows[:, :-1].long(), windows[:, 1:].flatten().long()


def standard_library(folder: Path | None = None) -> Text:
    """The sources of this Python's top-level modules, by name; `HELD_OUT` apart from all others.

    Only what `sys.stdlib_module_names` lists: files that a build or a distribution adds are not part of it.
    Raises NMError if there are none, as where Python lies in a zip file.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in folder.glob("*.py") if file.stem in sys.stdlib_module_names)
    missing = set(HELD_OUT) - {file.name for file in files}
    if missing:
        raise nm.NMError(f"{folder} has no {', '.join(sorted(missing))}: the text is the source of the standard library")
    train = "".join(_source(file) for file in files if file.name not in HELD_OUT)
    held = "".join(_source(file) for file in files if file.name in HELD_OUT)
    digest = hashlib.sha256(f"{train}\0{held}".encode()).hexdigest()[:16]
    return Text(_symbols(train), _symbols(held), digest)


def _source(file: Path) -> str:
    with tokenize.open(file) as source:  # as the file itself says that it is encoded
        return source.read()


def _symbols(text: str) -> Tensor:
    of = torch.full((256,), SYMBOLS.index("?"), dtype=torch.uint8)
    of[torch.tensor(list(SYMBOLS.encode()))] = torch.arange(len(SYMBOLS), dtype=torch.uint8)
    return of[torch.frombuffer(bytearray(text, "ascii", "replace"), dtype=torch.uint8).long()]
