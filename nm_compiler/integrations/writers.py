"""Where rows of `nm.Telemetry` go: TensorBoard, or a CSV file. A writer is a function of a row."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nm_compiler.errors import NMError
from nm_compiler.telemetry import Row, flat, named


def tensorboard(writer: Any, prefix: str = "sparsity") -> Callable[[Row], None]:
    """A writer for TensorBoard: a scalar for every number of a row, ``sparsity/total/retained`` and so on.

    writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its ``add_scalar``.
    """

    def write(row: Row) -> None:
        for key, value in flat(row).items():
            writer.add_scalar(f"{prefix}/{key}", value, row["step"])

    return write


def csv_file(path: str | Path) -> Callable[[Row], None]:
    """A writer for a CSV file: a line for every weight and one for the total, flushed; a file that is there goes on.

    Columns: step, name ("total" or the weight's), the numbers of `nm.Telemetry` and those that the method adds in the first
    row; what a method does not have is empty. Raises NMError if the file is there and is not one of these, or lacks a column.
    """
    file, head = Path(path), list[str]()
    if file.exists() and file.stat().st_size:
        with file.open(newline="") as old:
            head += next(csv.reader(old), [])
        if head[: len(_HEAD)] != _HEAD:
            raise NMError(f"{file} is not a file of telemetry: its first line is not {','.join(_HEAD)}; give another path")
    file.open("a").close()  # a place that cannot be written is found out now

    return partial(_append, file, head)  # which goes to other processes, as a trainer that spawns them sends it


_HEAD = ["step", "name", "retained", "nonzero", "flipped", "live", "backward_kept", "gradient_gap"]


def _append(file: Path, head: list[str], row: Row) -> None:
    """Write the lines of a row. head: the columns of the file, found here if it has none yet."""
    lines = [{"step": row["step"], "name": name, **values} for name, values in named(row).items()]
    columns = list(dict.fromkeys([*_HEAD, *(key for line in lines for key in line)]))
    lacking = [column for column in columns if head and column not in head]
    if lacking:
        raise NMError(f"{file} has no column {lacking[0]!r}, which this row has: give csv_file another path")
    with file.open("a", newline="") as out:
        if not head:
            head.extend(columns)
            csv.writer(out).writerow(head)
        csv.DictWriter(out, head).writerows(lines)
