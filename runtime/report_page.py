"""The report as HTML: a table with bars for shares, and above it a bar for every measured time."""

from __future__ import annotations

import html
from collections.abc import Sequence

from nm_compiler.runtime.report import HEADINGS, MEANINGS, NUMBERS, SHARES, Report, Row, cell

_STYLE = """<style>
.nm-report{font:14px/1.45 system-ui,sans-serif;color:#1b2430;overflow-x:auto}
.nm-report table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.nm-report th,.nm-report td{padding:.28em .8em;text-align:left;border-bottom:1px solid #e6e9ee;white-space:nowrap}
.nm-report .number{text-align:right}
.nm-report .words{white-space:normal;min-width:16em}
.nm-report th{color:#5b6675;font-weight:600}
.nm-report th[title]{text-decoration:underline dotted;cursor:help}
.nm-report tr.dense td{color:#6d7786}
.nm-report .times{display:grid;grid-template-columns:max-content 1fr max-content;gap:.15em .8em;margin:1em 0;max-width:60em}
.nm-report .times i{display:block;height:.5em;border-radius:2px;background:#c3cad4}
.nm-report .times i.fast{background:#2f9e62}
.nm-report .key b{display:inline-block;width:1.6em;height:.6em;border-radius:2px;background:#c3cad4;margin:0 .4em 0 1em}
.nm-report .key b.fast{background:#2f9e62}
.nm-report .bar{display:inline-block;height:.62em;background:#3b7dd8;border-radius:2px;margin-right:.5em}
</style>"""


def page(report: Report) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(report.title)}</title>"
        f'</head>\n<body style="margin:1.5rem">\n{table(report)}</body></html>\n'
    )


def table(report: Report) -> str:
    """A part of a document that needs nothing else."""
    columns = report.columns()
    below = "".join(f"<p>{html.escape(line)}</p>\n" for line in (report.summary(), *report.notes))
    head = "".join(f"<th{_kind(column)}{_meaning(column)}>{html.escape(HEADINGS[column])}</th>" for column in columns)
    body = "".join(
        f'<tr class="{row.status}">' + "".join(_cell(row, column) for column in columns) + "</tr>\n" for row in report.rows
    )
    return (
        f'{_STYLE}<div class="nm-report"><h2>{html.escape(report.title)}</h2>\n{below}{_picture(report.rows)}'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    bar = f'<span class="bar" style="width:{4 * value:.2f}em"></span>' if column in SHARES and value is not None else ""
    return f"<td{_kind(column)}>{bar}{html.escape(cell(row, column))}</td>"


def _kind(column: str) -> str:
    if column in NUMBERS:
        return " class=number"
    return " class=words" if column in ("reason", "hint") else ""


def _meaning(column: str) -> str:
    return f' title="{html.escape(MEANINGS[column])}"' if column in MEANINGS else ""


def _picture(rows: Sequence[Row]) -> str:
    """Two bars a layer, dense above sparse, where both were measured, and what they gained."""
    timed = [row for row in rows if row.dense_ms is not None and row.sparse_ms is not None]
    most = max((max(row.dense_ms or 0.0, row.sparse_ms or 0.0) for row in timed), default=0.0)
    if not most:
        return ""
    lines = []
    for row in timed:
        wide = [100 * (value or 0.0) / most for value in (row.dense_ms, row.sparse_ms)]
        fast = " class=fast" if row.status == "sparse" else ""
        bars = f'<i style="width:{wide[0]:.1f}%"></i><i{fast} style="width:{wide[1]:.1f}%"></i>'
        title = html.escape(f"dense {cell(row, 'dense_ms')} ms, sparse {cell(row, 'sparse_ms')} ms")
        name, gain = html.escape(row.name), cell(row, "speedup")
        lines.append(f'<span>{name}</span><span title="{title}">{bars}</span><span class=number>{gain}</span>')
    key = (
        '<p class="key">Milliseconds a call, dense above sparse:<b></b>dense, or sparse and not chosen'
        "<b class=fast></b>sparse and chosen</p>\n"
    )
    return f'{key}<div class="times">{"".join(lines)}</div>\n'
