"""The page: what N:M sparsity is, what this run found, and pictures of it, in one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator
from string import Template

from nm_compiler.demo import plots, words
from nm_compiler.demo.programs import Program, programs
from nm_compiler.demo.results import HEADINGS, Outcome, Row
from nm_compiler.demo.settings import TITLES, Entry
from nm_compiler.demo.template import PAGE


def page(outcome: Outcome) -> str:
    """The whole page as HTML."""
    settings = outcome.settings
    return Template(PAGE).substitute(
        title=html.escape(words.title(outcome)),
        found=html.escape(words.found(outcome)),
        spread=words.spread(outcome),
        worst=", in the worst seed" if settings.seeds > 1 else "",
        retained=_RETAINED if "lbc" in settings.methods else "",
        description=html.escape(outcome.describe()),
        samples=plots.draw(plots.samples, outcome, "Some of the test images"),
        groups=_groups(),
        methods=_methods(settings.methods),
        table=_table(outcome),
        upkeep=_upkeep(outcome),
        recipe=(
            f"SGD, momentum {settings.momentum}, weight decay {settings.weight_decay:g}, peak learning rate {settings.lr:g} "
            f"after a short warm-up, then one cosine down to zero over all {outcome.steps:,} steps"
        ),
        sections="\n".join(_sections(outcome)),
    )


def _sections(outcome: Outcome) -> Iterator[str]:
    settings, several = outcome.settings, outcome.settings.seeds > 1
    yield _figure(
        outcome, plots.finals, "Accuracy of the frozen models",
        ("A dot is a seed, a bar the mean of the seeds; the dashed line is the dense mean. " if several else "The dashed line "
        "is dense training. ") + "Each frozen model is the user's own plain module again, with zeros in its weights.",
    )  # fmt: skip
    yield _figure(
        outcome, plots.accuracies, "Accuracy over time",
        f"{'Mean of the seeds; the band is one standard deviation. ' if several else ''}The dotted line is half-way. There "
        "one-shot magnitude prunes a model that was dense so far, and LBC has settled on its last combination; before that "
        "line these two are denser than N:M.",
    )  # fmt: skip
    if "lbc" in settings.methods:
        yield _figure(
            outcome, plots.live, "LBC: live combinations over time",
            "A group of M weights can keep N of them in C(M, N) ways. LBC begins with all of these combinations live, learns "
            "a score for each, and retires the worst until one is left. Dots are counted in the model; the line is the "
            "schedule of the paper.",
        )  # fmt: skip
    if "bimask" in settings.methods:
        yield _figure(
            outcome, plots.orders, "Bi-Mask: what the backward mask keeps, layer by layer",
            "In the backward pass the same weights are read along the other axis, where the forward mask F is not N:M. "
            "Bi-Mask prunes W·F once more along that axis, and first reorders its channels so that little is lost. The "
            "further right, the closer its gradient is to the exact one. A layer of one group has no order to choose.",
        )  # fmt: skip
    yield _figure(
        outcome, plots.weights, "The weights themselves",
        f"Part of the last 3x3 convolution (its middle tap, at most 16 by 16 channels, first seed): a row is an output "
        f"channel, vertical lines bound the groups of {settings.patterns[0].m}. Blank squares are exact zeros, and no group "
        "has more than N coloured ones.",
    )  # fmt: skip
    yield _block("What the compiler changed", _programs(outcome), wide=True)
    yield _block("Weight by weight", "".join(_reports(outcome)), wide=True)


def _figure(outcome: Outcome, picture: plots.Picture, title: str, caption: str) -> str:
    return _block(title, f"<p>{html.escape(caption)}</p>\n<figure>{plots.draw(picture, outcome, title)}</figure>")


def _block(title: str, body: str, *, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def _groups() -> str:
    """Three groups of four weights, before and after 2:4."""
    weights = ((0.9, -0.1, 0.4, -0.7), (0.2, 0.8, -0.6, 0.1), (-0.3, 0.1, 0.2, 0.5))
    dense = "".join(_group(group, kept=range(4)) for group in weights)
    sparse = "".join(_group(group, sorted(range(4), key=lambda i: -abs(group[i]))[:2]) for group in weights)
    return f'<div class="groups"><span>dense</span>{dense}<span>2:4</span>{sparse}</div>'


def _group(group: tuple[float, ...], kept: range | list[int]) -> str:
    cells = (f"<b>{value:+.1f}</b>" if index in kept else "<i>0</i>" for index, value in enumerate(group))
    return f"<div>{''.join(cells)}</div>"


_RETAINED = " LBC does not go by magnitude, so it retains less of it; that is no fault."

_WAYS = {
    "magnitude": "Train dense for half of the steps, prune the smallest weights once, train on with the rest.",
    "srste": "Prune the smallest weights afresh in every step; all keep learning, the pruned ones pulled towards zero.",
    "lbc": "Learn a score for every way to keep N of M; the lowest-scored retire step by step until one is left.",
    "bimask": "As SR-STE, and the gradient flows back through weights that are N:M along the other axis too, so that "
    "N:M hardware could run both passes.",
}


def _methods(methods: tuple[str, ...]) -> str:
    return "\n".join(f"<dt>{TITLES[method]}</dt><dd>{html.escape(_WAYS[method])}</dd>" for method in methods)


def _table(outcome: Outcome) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    body = "".join(_line(row, first=row.entry.method in ("dense", outcome.settings.methods[0])) for row in outcome.rows())
    return f"<table class=results><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _line(row: Row, *, first: bool) -> str:
    name, *rest = row.cells
    dot = f'<span class=dot style="background:{plots.COLORS[row.entry.method]}"></span>'
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
    return f"<tr{' class=first' if first else ''}><td>{dot}{html.escape(name)}</td>{cells}</tr>\n"


def _upkeep(outcome: Outcome) -> str:
    rows = [row for row in outcome.rows() if row.entry.method == "bimask"]
    if not rows:
        return ""
    shares = " and ".join(f"{row.upkeep:.2f}x at {row.entry.pattern}" for row in rows)
    return f"For Bi-Mask, {shares} of it is the search for channel orders, every 100 steps."


def _programs(outcome: Outcome) -> str:
    methods = tuple(method for method in ("lbc", "bimask", "srste", "magnitude") if method in outcome.settings.methods)[:2]
    columns = "".join(map(_program, programs(outcome.settings.patterns[0], methods)))
    return (
        "<p>One residual block as <code>nm.show</code> prints it: the dense program and what each method made of it. Marked "
        "lines are new (<code>nm.*</code> are the library's operations); in pale ones an argument is another one. The user's "
        "source stays as it is. "
        f"(Loads of batch-norm's own tensors are left out.)</p>\n<div class=programs>{columns}</div>"
    )


def _program(program: Program) -> str:
    lines = "".join(f"<div{f' class={mark}' if mark else ''}>{html.escape(line)}</div>" for line, mark in program.lines)
    return f"<div><h3>{html.escape(program.title)}</h3><code>{lines}</code></div>"


def _reports(outcome: Outcome) -> Iterator[str]:
    yield "<p>What <code>nm.report</code> says at the end of training, first seed: which weights are sparse, and why not.</p>"
    for pattern in outcome.settings.patterns:
        for method in reversed(outcome.settings.methods):
            entry = Entry(method, pattern)
            report = outcome.of(entry)[0].report
            opened = " open" if (method, pattern) == (outcome.settings.methods[-1], outcome.settings.patterns[0]) else ""
            if report:
                yield f"<details{opened}><summary>{html.escape(str(entry))}</summary>{report.to_html()}</details>\n"
