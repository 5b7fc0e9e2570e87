"""The report: a line a weight, sparse or dense and why, as text, dict and HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
        kept = [row.retained * _size(row) for row in sparse if row.retained is not None]
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
            "retained": sum(kept) / size if kept else None,
            **(lowered if timed else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """``{"title": .., "weights": [{"name", "op", "shape", "pattern", "status", "reason", ..}], "totals": {..}}``."""
        rows = [row.to_dict() for row in self.rows]
        return {"title": self.title, "weights": rows, "totals": self.totals, "notes": list(self.notes)}

    def __str__(self) -> str:
        columns = [column for column in _COLUMNS if column in _ALWAYS or any(_cell(row, column) for row in self.rows)]
        lines = [[_HEADINGS[column] for column in columns]]
        lines += [[_cell(row, column) for column in columns] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "-" * max(map(len, text)))
        return "\n".join([self.title, "", *text, "", self.summary(), *self.notes])

    def summary(self) -> str:
        """One sentence with the totals."""
        totals = self.totals
        share = f"{totals['sparse_share']:.0%} of {totals['parameters']:,} weights"
        retained = f", {totals['retained']:.1%} of their magnitude retained" if totals["retained"] is not None else ""
        if totals.get("ms"):
            retained += f"; {totals['dense_ms']:.3g} ms dense, {totals['ms']:.3g} ms as chosen, layer by layer"
        return f"{totals['sparse']} of {totals['weights']} tensors are sparse ({share}{retained})."

    def to_html(self) -> str:
        """A self-contained table, dense rows greyed, shares drawn as bars."""
        columns = [column for column in _COLUMNS if column in _ALWAYS or any(_cell(row, column) for row in self.rows)]
        below = " ".join([self.summary(), *self.notes])
        head = "".join(f"<th>{html.escape(_HEADINGS[column])}</th>" for column in columns)
        body = "".join(
            f'<tr class="{row.status}">' + "".join(_html_cell(row, column) for column in columns) + "</tr>\n"
            for row in self.rows
        )
        picture = _picture(self.rows)
        return (
            f'{_STYLE}<div class="nm-report"><h2>{html.escape(self.title)}</h2><p>{html.escape(below)}</p>\n{picture}'
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
        )


_COLUMNS = (
    "name", "op", "shape", "pattern", "status", "retained", "backward_kept", "live", "nonzero", "runs", "dense_ms",
    "sparse_ms", "speedup", "reason", "hint",
)  # fmt: skip
_ALWAYS = ("name", "op", "shape", "pattern", "status", "reason")
_HEADINGS: Mapping[str, str] = {
    "name": "weight", "op": "op", "shape": "shape", "pattern": "pattern", "status": "status", "retained": "retained",
    "backward_kept": "backward kept", "live": "live", "nonzero": "non-zero", "reason": "why", "runs": "ran sparse",
    "dense_ms": "dense ms", "sparse_ms": "sparse ms", "speedup": "speed-up", "hint": "what would help",
}  # fmt: skip
_SHARES = ("retained", "backward_kept", "nonzero")
_STYLE = """<style>
.nm-report{font:14px/1.45 system-ui,sans-serif;color:#1b2430}
.nm-report table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.nm-report th,.nm-report td{padding:.28em .8em;text-align:left;border-bottom:1px solid #e6e9ee;white-space:nowrap}
.nm-report th{color:#5b6675;font-weight:600}
.nm-report tr.dense td{color:#8a94a3}
.nm-report .times{display:grid;grid-template-columns:max-content 1fr;gap:.15em .8em;margin:1em 0;max-width:60em}
.nm-report .times i{display:block;height:.5em;border-radius:2px;background:#c3cad4}
.nm-report .times i.fast{background:#2f9e62}
.nm-report .bar{display:inline-block;height:.62em;background:#3b7dd8;border-radius:2px;margin-right:.5em}
</style>"""


def _size(row: Row) -> int:
    count = 1
    for size in row.shape:
        count *= size
    return count


def _cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    if value is None:
        return ""
    if column in ("dense_ms", "sparse_ms"):
        return f"{value:.3g}"
    if column == "speedup":
        return f"{value:.2f}x"
    if column == "shape":
        return "x".join(map(str, value))
    if column in _SHARES:
        return f"{value:.1%}"
    if column == "live":
        return f"{value:.3g}"
    if column == "reason" and row.hint:
        return str(value).removesuffix(f": {row.hint}")  # which has a column of its own
    return str(value)


def _html_cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    bar = f'<span class="bar" style="width:{4 * value:.2f}em"></span>' if column in _SHARES and value is not None else ""
    return f"<td>{bar}{html.escape(_cell(row, column))}</td>"


def _picture(rows: tuple[Row, ...]) -> str:
    """Two bars a layer, dense above sparse, where both were measured."""
    timed = [row for row in rows if row.dense_ms is not None and row.sparse_ms is not None]
    most = max((max(row.dense_ms or 0.0, row.sparse_ms or 0.0) for row in timed), default=0.0)
    if not most:
        return ""
    lines = []
    for row in timed:
        wide = [100 * (value or 0.0) / most for value in (row.dense_ms, row.sparse_ms)]
        fast = " class=fast" if row.status == "sparse" else ""
        bars = f'<i style="width:{wide[0]:.1f}%"></i><i{fast} style="width:{wide[1]:.1f}%"></i>'
        title = html.escape(f"dense {row.dense_ms:.3g} ms, sparse {row.sparse_ms:.3g} ms")
        lines.append(f'<span>{html.escape(row.name)}</span><span title="{title}">{bars}</span>')
    return f'<div class="times">{"".join(lines)}</div>\n'
