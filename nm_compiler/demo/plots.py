"""The pictures of the page, each an SVG text that needs nothing else: no scripts, no fonts to fetch, no files."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nm_compiler.demo.results import Outcome, Run
from nm_compiler.demo.settings import DENSE, TITLES, Entry
from nm_compiler.methods.lbc import LBC
from nm_compiler.pattern import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"dense": "#3d4654", "magnitude": "#d98e04", "srste": "#2f7ed8", "lbc": "#0e9a6c", "bimask": "#cc3d6e"}
_STYLE: Any = {
    "font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "nm", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#b8c0cc", "axes.labelcolor": "#3d4654", "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "xtick.color": "#5b6675", "ytick.color": "#5b6675",
    "axes.grid": True, "grid.color": "#e9ecf1", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


Picture = Callable[[Outcome], "Figure"]
"""Draws one thing that a run found."""


def draw(picture: Picture, outcome: Outcome, label: str) -> str:
    """One of the pictures below as an inline ``<svg>``. label: what it shows, for those who do not see it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = picture(outcome)
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None, "Type": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def accuracies(outcome: Outcome) -> Figure:
    """Test accuracy over training: a line for the mean of the seeds, a band of one standard deviation."""
    figure, panels = _panels(outcome, height=3.7, sharey=True)
    floor = min(row.accuracy for row in outcome.rows()) - 0.08
    for axes, pattern in zip(panels, outcome.settings.patterns, strict=True):
        for entry in _entries(outcome, pattern):
            runs = outcome.of(entry)
            share = [100 * point for point, _ in runs[0].curve]
            values = np.array([[100 * value for _, value in run.curve] for run in runs])
            mean, spread = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(share))
            color = COLORS[entry.method]
            axes.plot(share, mean, color=color, label=TITLES[entry.method], lw=1.8, zorder=2 + (entry != DENSE))
            axes.fill_between(share, mean - spread, np.minimum(mean + spread, 100), color=color, alpha=0.13, lw=0)
        axes.axvline(50, color="#9aa4b2", lw=1, ls=":")
        axes.set(title=f"{pattern}", xlabel="training done, %", xlim=(0, 100))
        axes.set_ylim(max(0.0, 100 * floor), min(100.0, 100 * max(row.accuracy for row in outcome.rows()) + 1.5))
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def finals(outcome: Outcome) -> Figure:
    """The accuracy of the frozen models: a dot a seed, a bar for their mean, dense as a line to compare with."""
    figure, panels = _panels(outcome, height=2.9, sharey=True)
    dense = [100 * run.accuracy for run in outcome.of(DENSE)]
    for axes, pattern in zip(panels, outcome.settings.patterns, strict=True):
        entries = _entries(outcome, pattern)
        axes.axhline(float(np.mean(dense)), color=COLORS["dense"], lw=1, ls="--")
        for place, entry in enumerate(entries):
            found = [100 * run.accuracy for run in outcome.of(entry)]
            spots = place + np.linspace(-0.12, 0.12, len(found)) * (len(found) > 1)
            axes.plot([place - 0.3, place + 0.3], [np.mean(found)] * 2, color=COLORS[entry.method], lw=3)
            axes.plot(spots, found, "o", color=COLORS[entry.method], ms=6, mec="white")
        names = [TITLES[entry.method].replace("one-shot ", "one-shot\n") for entry in entries]
        axes.set_xticks(range(len(entries)), names)
        axes.set(title=f"{pattern}")
        axes.grid(False, axis="x")
    panels[0].set_ylabel("test accuracy, %")
    return figure


def live(outcome: Outcome) -> Figure:
    """LBC: how many combinations a group can still choose from, measured and as the paper's schedule has it."""
    figure, panels = _panels(outcome, height=3.1)
    method = LBC()
    for axes, pattern in zip(panels, outcome.settings.patterns, strict=True):
        share = np.linspace(0, 1, 1001)
        tau = np.clip((share - method.t_i) / (method.t_f - method.t_i), 0, 1)
        theory = [1 + math.ceil(round((pattern.combinations - 1) * (1 - t) ** 3, 9)) for t in tau]
        axes.plot(100 * share, theory, color="#9aa4b2", lw=1.6, ls="--", label="schedule: 1 + ceil((C - 1)(1 - τ)³)")
        runs = outcome.of(Entry("lbc", pattern))
        times = [100 * point for point, _ in runs[0].live]
        mean = np.mean([[value for _, value in run.live] for run in runs], axis=0)
        axes.plot(times, mean, "o", color=COLORS["lbc"], ms=4.5, label="measured, mean of all groups")
        axes.set(title=f"{pattern}, C = {pattern.combinations}", xlabel="training done, %", xlim=(-1, 101))
        axes.set_ylim(0, pattern.combinations + 0.5)
        axes.set_yticks(range(pattern.combinations + 1) if pattern.combinations < 10 else axes.get_yticks())
    panels[0].set_ylabel("live combinations a group")
    panels[-1].legend(loc="upper right")
    return figure


def orders(outcome: Outcome) -> Figure:
    """Bi-Mask: the share of the forward weights' magnitude that the backward mask keeps, a row for each weight."""
    layers = len(outcome.of(Entry("bimask", outcome.settings.patterns[0]))[0].orders)
    figure, panels = _panels(outcome, height=1.3 + 0.3 * layers, sharey=True)
    marks = (
        ("start", "fresh weights, own order", "D", "#c3cad4", "#c3cad4"),
        ("chance", "trained, random orders", "|", "#5b6675", "#5b6675"),
        ("identity", "trained, own order", "o", "white", COLORS["bimask"]),
        ("searched", "trained, order found", "o", COLORS["bimask"], COLORS["bimask"]),
    )
    for axes, pattern in zip(panels, outcome.settings.patterns, strict=True):
        runs = outcome.of(Entry("bimask", pattern))
        means = {key: 100 * np.mean([[getattr(layer, key) for layer in run.orders] for run in runs], 0) for key, *_ in marks}
        rows = np.arange(layers)
        axes.hlines(rows, means["identity"], means["searched"], color=COLORS["bimask"], alpha=0.4, lw=3, zorder=1)
        for key, label, marker, face, edge in marks:
            axes.plot(
                means[key], rows, marker, color=face, mec=edge, ms=9 if marker == "|" else 6, mew=1.6, label=label, ls=""
            )
        axes.set_yticks(rows, [layer.name.removesuffix(".weight") for layer in runs[0].orders])
        axes.set(title=f"{pattern}", xlabel="kept by the backward mask, % of Σ|W·F|", ylim=(layers - 0.5, -0.5))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def weights(outcome: Outcome) -> Figure:
    """The same 16x16 weights of one layer, in every contestant: zeros are white, a group is M squares of a row."""
    patterns = outcome.settings.patterns
    columns = 1 + len(outcome.settings.methods)
    size = (2.05 * columns, 2.25 * len(patterns))
    figure, grid = _figure(size, len(patterns), columns)
    for pattern, panels in zip(patterns, grid, strict=True):
        for entry, axes in zip(_entries(outcome, pattern), panels, strict=True):
            _tile(axes, outcome.of(entry)[0], pattern)
            axes.set_title(str(entry), fontsize=9)
    return figure


def samples(outcome: Outcome) -> Figure:
    """What the network looks at: some test images, as they are."""
    figure, panels = _figure((10, 0.9), 1, len(outcome.examples))
    for axes, image in zip(panels[0], outcome.examples, strict=True):
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r", interpolation="nearest")
        axes.axis("off")
    return figure


def _tile(axes: Axes, run: Run, pattern: Pattern) -> None:
    assert run.sample is not None
    part = run.sample[:16, :16]
    top = float(part.abs().max()) or 1.0
    shown = torch.where(part == 0, torch.nan, part)
    axes.imshow(shown.numpy(), cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    for edge in range(pattern.m, part.shape[1], pattern.m):
        axes.axvline(edge - 0.5, color="#7d8794", lw=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color="#7d8794", linewidth=0.8)


def _panels(outcome: Outcome, height: float, *, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    count = len(outcome.settings.patterns)
    width = max(6.0, 5.2 * count)
    figure, panels = _figure((width, height), 1, count, sharey=sharey)
    return figure, list(panels[0])


def _figure(size: tuple[float, float], rows: int, columns: int, *, sharey: bool = False) -> tuple[Figure, Any]:
    """A figure without pyplot, which would keep it and look for a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _entries(outcome: Outcome, pattern: Pattern) -> list[Entry]:
    return [DENSE, *(Entry(method, pattern) for method in outcome.settings.methods)]
