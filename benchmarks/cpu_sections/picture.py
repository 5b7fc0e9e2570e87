"""Bars of whole networks, dense and packed, drawn from the JSON that benchmarks/cpu.py wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LEGEND = {"eager": "dense, eager", "inductor": "dense, inductor, frozen weights", "packed": "packed by nm.lower"}
_CALLED = {"avx512": "AVX-512", "avx2": "AVX2"}


def draw(results: Sequence[Path], picture: Path) -> None:
    """One panel a number of threads and instruction set: times relative to inductor, shorter is faster. Needs matplotlib.

    picture: an .svg or .png to write.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = _together(results)
    figure, panels = pyplot.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.2), sharey=True, squeeze=False)
    for panel, ((threads, isa), rows) in zip(panels[0], shown.items(), strict=True):
        places = range(len(rows))
        for offset, (name, colour) in enumerate((("eager", "#b8bec8"), ("inductor", "#7d8899"), ("packed", "#2f6fde"))):
            sizes = [_milliseconds(row, name) / row["ms"]["inductor"] for row in rows]
            panel.barh(
                [place + 0.27 * (offset - 1) for place in places], sizes, height=0.25, color=colour, label=_LEGEND[name]
            )
        for place, row in zip(places, rows, strict=True):
            share = row["ms"]["packed"] / row["ms"]["inductor"]
            panel.text(share + 0.02, place + 0.3, f"{row['over inductor']:.2f}x", va="center", fontsize=7, color="#2f6fde")
        panel.set_yticks(list(places), [row["net"] for row in rows], fontsize=8)
        counted = "1 thread" if threads == 1 else f"{threads} threads"
        title = f"{rows[0]['pattern']}, {counted}, {_CALLED.get(isa, isa)}"
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("time, dense under inductor = 1; shorter is faster", fontsize=8)
        panel.axvline(1, color="#7d8899", linewidth=0.6)
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    bars, names = panels[0][0].get_legend_handles_labels()
    figure.legend(bars, names, ncols=3, fontsize=8, frameon=False, loc="lower center")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(picture)


def _together(results: Sequence[Path]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The networks of all files, by threads and instruction set."""
    rows = dict[tuple[int, str], list[dict[str, Any]]]()
    for path in results:
        found = json.loads(path.read_text())
        rows.setdefault((found["environment"]["threads"], found["isa"]), []).extend(found["nets"])
    return rows


def _milliseconds(row: dict[str, Any], name: str) -> float:
    """Of eager torch that of its faster memory format."""
    ms: dict[str, float] = row["ms"]
    return min(ms["eager"], ms.get("eager, channels last", ms["eager"])) if name == "eager" else ms[name]
