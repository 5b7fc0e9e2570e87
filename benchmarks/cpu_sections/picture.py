"""Bars of whole networks, dense and packed, drawn from the JSON that benchmarks/cpu.py wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(results: Sequence[Path], picture: Path) -> None:
    """One panel a file: times relative to inductor, lower is faster. picture: an .svg or .png. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(5.2 * len(results), 3.6), sharey=True, squeeze=False)
    for panel, path in zip(panels[0], results, strict=True):
        found: dict[str, Any] = json.loads(path.read_text())
        rows = found["nets"]
        places = range(len(rows))
        for offset, (name, colour) in enumerate((("eager", "#b8bec8"), ("inductor", "#7d8899"), ("packed", "#2f6fde"))):
            sizes = [_milliseconds(row, name) / row["ms"]["inductor"] for row in rows]
            panel.barh([place + 0.27 * (offset - 1) for place in places], sizes, height=0.25, color=colour, label=name)
        for place, row in zip(places, rows, strict=True):
            share = row["ms"]["packed"] / row["ms"]["inductor"]
            panel.text(share + 0.02, place + 0.27, f"{row['over inductor']:.2f}x", va="center", fontsize=7, color="#2f6fde")
        panel.set_yticks(list(places), [row["net"] for row in rows], fontsize=8)
        panel.set_title(f"{rows[0]['pattern']}, {found['environment']['threads']} thread(s), {found['isa']}", fontsize=9)
        panel.set_xlabel("time, inductor with frozen weights = 1", fontsize=8)
        panel.axvline(1, color="#7d8899", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(fontsize=7, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(picture)


def _milliseconds(row: dict[str, Any], name: str) -> float:
    return float(min(value for key, value in row["ms"].items() if key.startswith(name)))
