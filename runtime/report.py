"""The report: a line a weight, sparse or dense and why, as text and dict; as a page in `report_page`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nm_compiler.pattern import Pattern
from nm_compiler.wording import several


@dataclass(frozen=True, slots=True)
class Row:
    """One weight. Shares are 0 to 1, or None where they mean nothing.

    retained: sum |w * mask| / sum |w|; backward_kept: sum |w * B| / sum |w * F| under Bi-Mask; live: mean number of
    live combinations a group, under LBC; nonzero: share of weights that the forward product uses;
    runs: how often the weight ran sparse, where that is counted.
    Of a lowered model: eligible: whether the runtime has a sparse kernel for it; kernel: what runs it; dense_ms, sparse_ms:
    milliseconds a call, measured on the user's device; bytes: that the weight takes now; hint: what would change the status;
    again: an earlier row stands for the same weight, run in the same way for another product: totals count its time alone.
    of: the weight that the row is of, where its name may be that of a part: totals count a weight once.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    pattern: str | None
    status: str
    reason: str
    retained: float | None = None
    backward_kept: float | None = None
    live: float | None = None
    nonzero: float | None = None
    eligible: bool | None = None
    kernel: str | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None
    bytes: int | None = None
    hint: str | None = None
    runs: int | None = None
    again: bool = False
    of: str | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster sparse was than dense, where both were measured."""
        return self.dense_ms / self.sparse_ms if self.dense_ms and self.sparse_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return {**asdict(self), "shape": list(self.shape), "speedup": self.speedup}


@dataclass(frozen=True, slots=True)
class Report:
    """All weights of a model. ``print`` it, or take `to_dict` or `to_html`. notes: lines about the model as a whole."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, Any]:
        """Counts of weights and parameters over the whole report. A weight of which one part is dense counts as dense."""
        rows = [row for row in self.rows if not row.again]
        sparse = [row for row in rows if row.status == "sparse"]
        size, total = sum(map(_size, sparse)), sum(map(_size, rows))
        weights, dense = {row.of or row.name for row in rows}, {row.of or row.name for row in rows if row.status != "sparse"}
        kept = [(row.retained * _size(row), _size(row)) for row in sparse if row.retained is not None]
        timed = [row for row in self.rows if row.dense_ms is not None]
        spent = sum((row.sparse_ms if row.status == "sparse" else row.dense_ms) or 0.0 for row in timed)
        lowered = {
            "bytes": sum(row.bytes or 0 for row in rows),
            "dense_ms": sum(row.dense_ms or 0.0 for row in timed),
            "ms": spent,
        }
        return {
            "weights": len(weights),
            "sparse": len(weights - dense),
            "dense": len(dense),
            "parameters": total,
            "sparse_parameters": size,
            "sparse_share": size / total if total else 0.0,
            "retained": sum(part for part, _ in kept) / sum(whole for _, whole in kept) if kept else None,
            **(lowered if timed else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """``{"title": .., "weights": [{"name", "op", "shape", "pattern", "status", "reason", ..}], "totals": {..}}``."""
        rows = [row.to_dict() for row in self.rows]
        return {"title": self.title, "weights": rows, "totals": self.totals, "notes": list(self.notes)}

    def columns(self) -> list[str]:
        """The attributes of a `Row` that say something here."""
        return [column for column in HEADINGS if column in _ALWAYS or any(cell(row, column) for row in self.rows)]

    def __str__(self) -> str:
        columns = [column for column in self.columns() if column != "hint"]
        lines = [[HEADINGS[column] for column in columns]]
        lines += [[cell(row, column) for column in columns] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        text = [_aligned(line, columns, widths) for line in lines]
        text.insert(1, "-" * max(map(len, text)))
        return "\n".join([self.title, "", *text, "", self.summary(), *self.hints(), *self.notes])

    def hints(self) -> list[str]:
        """What would change the status of dense weights, a line for each way with the weights that it would help."""
        helped: dict[str, list[str]] = {}
        for row in self.rows:
            if row.hint:
                helped.setdefault(row.hint, []).append(row.name)
        return [f"What would help {several(names, 3)}: {hint}." for hint, names in helped.items()]

    def summary(self) -> str:
        """One sentence with the totals."""
        totals = self.totals
        share = f"{_percent(totals['sparse_share'])} of {totals['parameters']:,} weights"
        retained = f", {totals['retained']:.1%} of their magnitude retained" if totals["retained"] is not None else ""
        if totals.get("ms"):
            retained += f"; {totals['dense_ms']:.3g} ms dense, {totals['ms']:.3g} ms as chosen, layer by layer"
        undecided = len({row.of or row.name for row in self.rows if _is_undecided(row)})
        later = f"; masks of {undecided} still keep more than their pattern" if undecided else ""
        return f"{totals['sparse']} of {totals['weights']} tensors are sparse ({share}{retained}){later}."

    def to_html(self) -> str:
        """A self-contained table, dense rows greyed, shares and times drawn as bars."""
        from nm_compiler.runtime.report_page import table

        return table(self)

    def to_page(self) -> str:
        """The table as a whole HTML document, to write to a file."""
        from nm_compiler.runtime.report_page import page

        return page(self)


HEADINGS: Mapping[str, str] = {
    "name": "weight", "op": "op", "shape": "shape", "pattern": "pattern", "status": "status", "retained": "retained",
    "backward_kept": "backward kept", "live": "live", "nonzero": "non-zero", "runs": "ran sparse", "dense_ms": "dense ms",
    "sparse_ms": "sparse ms", "speedup": "speed-up", "reason": "why", "hint": "what would help",
}  # fmt: skip
"""The columns, in order."""
MEANINGS: Mapping[str, str] = {
    "retained": "share of the weight's magnitude that the mask keeps: sum |w * mask| / sum |w|",
    "backward_kept": "share of the masked weight's magnitude that the backward mask keeps",
    "live": "combinations a group can still choose from; 1 is decided",
    "nonzero": "share of the weight that the forward product uses",
    "runs": "calls so far in which the weight ran sparse",
    "dense_ms": "milliseconds a call on this device, dense",
    "sparse_ms": "milliseconds a call on this device, sparse",
    "speedup": "dense over sparse",
}
"""Of columns whose headings do not say all."""
_ALWAYS = ("name", "op", "shape", "pattern", "status", "reason")
SHARES = ("retained", "backward_kept", "nonzero")
NUMBERS = (*SHARES, "live", "runs", "dense_ms", "sparse_ms", "speedup")
"""Columns of numbers, which stand to the right."""


def cell(row: Row, column: str) -> str:
    """An attribute of a row as text; empty where it means nothing."""
    value = getattr(row, column)
    if value is None:
        return ""
    if column in ("dense_ms", "sparse_ms"):
        return f"{value:.3f}"
    if column == "speedup":
        return f"{value:.2f}x"
    if column == "shape":
        return "x".join(map(str, value))
    if column in SHARES:
        return f"{value:.1%}"
    if column == "live":
        return f"{value:.2f}"
    if column == "reason" and row.hint:
        return str(value).removesuffix(f": {row.hint}")  # which has a place of its own
    return str(value)


def _aligned(line: Sequence[str], columns: Sequence[str], widths: Sequence[int]) -> str:
    named = zip(line, columns, widths, strict=True)
    return "  ".join(text.rjust(width) if column in NUMBERS else text.ljust(width) for text, column, width in named).rstrip()


def _is_undecided(row: Row) -> bool:
    """Whether a mask keeps more than N of M so far, as those of LBC do until they are decided."""
    return bool(row.status == "sparse" and row.pattern and (row.nonzero or 0.0) > Pattern.parse(row.pattern).density)


def _percent(share: float) -> str:
    """All are all: a share of less than 1 is no 100 %, nor one of more than 0 none."""
    if 0.995 <= share < 1:
        return "more than 99%"
    return "less than 1%" if 0 < share < 0.005 else f"{share:.0%}"


def _size(row: Row) -> int:
    return math.prod(row.shape)
