"""Where rows of `nm.Telemetry` go: TensorBoard, or a CSV file. A writer is a function of a row."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nm_compiler.errors import NMError
from nm_compiler.telemetry import Row, flat


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

    Columns: step, name ("total" or the weight's), and the numbers of `nm.Telemetry`; what a method does not have is empty.
    Raises NMError if the file is there and is not one of these.
    """
    file = Path(path)
    head = ["step", "name", *_NUMBERS]
    if file.exists() and file.stat().st_size:
        with file.open(newline="") as old:
            if next(csv.reader(old), None) != head:
                raise NMError(f"{file} is not a file of telemetry: its first line is not {','.join(head)}; give another path")
    else:
        with file.open("w", newline="") as new:
            csv.writer(new).writerow(head)

    def write(row: Row) -> None:
        with file.open("a", newline="") as lines:
            writer = csv.DictWriter(lines, head)
            for name, values in {"total": row["total"], **row["weights"]}.items():
                writer.writerow({"step": row["step"], "name": name, **values})

    return write


_NUMBERS = ("retained", "nonzero", "flipped", "live", "backward_kept", "gradient_gap")
