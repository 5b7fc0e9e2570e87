"""Which models can be compiled at all: one row for each model of the zoo, each in a process of its own.

    python benchmarks/coverage.py                                  # everything, hours on one core
    python benchmarks/coverage.py --library timm --only 's*' --resume
    python benchmarks/coverage.py --quick --capture-only           # small variants, only whether they can be captured

See README.md for what the columns mean.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from harness import arguments, environment, table, write
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from workers import Row, each
from zoo import LIBRARIES, Entry, entries, seeded

import nm_compiler as nm
from nm_compiler.axes.analyse import analyse
from nm_compiler.capture import capture, in_mode
from nm_compiler.graph import reads
from nm_compiler.law import permutation_law
from nm_compiler.pattern import PatternMap
from nm_compiler.signature import Signature
from nm_compiler.sites import find
from nm_compiler.uses import Use, constants, ends, layouts, uses

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from awkward import AWKWARD

Captured = dict[bool, tuple[GraphModule, Signature]]
ALL = (*LIBRARIES, "awkward")


def listed(library: str | None) -> list[Entry]:
    """The zoo and the tests' awkward models."""
    awkward = [Entry("awkward", name, build, build) for name, build in AWKWARD.items()]
    wanted = ALL if library is None else (library,)
    return [entry for name in wanted for entry in (awkward if name == "awkward" else entries(name))]


def axes_row(entry: Entry, model: nn.Module, captured: Captured) -> Row:
    """Free input axes among those of all weights of products, stems left out; seconds of the analysis."""
    graphs = [gm for gm, _ in captured.values()]
    found = layouts(graphs, model)
    start = time.perf_counter()
    axes = analyse(model, list(captured.values()), layouts=found, outputs=entry.outputs)
    seconds = time.perf_counter() - start
    first = [ends(gm, constants(gm.graph))[0] for gm in graphs]
    wanted = [
        (name, layout.in_axis)
        for name, layout in found.items()
        if model.get_parameter(name).shape[layout.in_axis] > 1 and not _is_stem(graphs, first, name)
    ]
    pinned = [f"{name}[{axis}]" for name, axis in wanted if not axes.is_free(name, axis)]
    return {
        "axes_seconds": seconds, "input_axes": len(wanted), "free_input_axes": len(wanted) - len(pinned),
        "classes": len(axes), "free_classes": len(axes.free), "unknown_ops": dict(axes.unknown), "pinned_inputs": pinned,
    }  # fmt: skip


def _is_stem(graphs: Sequence[GraphModule], first: Sequence[Collection[Node]], name: str) -> bool:
    for gm, stems in zip(graphs, first, strict=True):
        fixed = constants(gm.graph)
        products = [use.node for node in reads(gm, name) for use in uses(node, fixed) if isinstance(use, Use)]
        if products:
            return all(node in stems for node in products)
    return False


def law_row(entry: Entry, undo: int) -> Row:
    """The law on the small variant: relative error after random orders, axes undone, those that nobody noticed."""
    model, args, kwargs = seeded(entry.small)
    start = time.perf_counter()
    law = permutation_law(model, args, kwargs, outputs=entry.outputs, undo=undo)
    return {
        "law_error": law.error, "law_dtype": str(law.dtype).removeprefix("torch."), "undone": law.undone,
        "undetected": list(law.undetected), "law_holds": law.holds, "law_seconds": time.perf_counter() - start,
    }  # fmt: skip


def measure(entry: Entry, *, quick: bool, capture_only: bool, undo: int) -> Iterator[Row]:
    """What is found out about one model, in parts: what is known before a crash is not lost with it."""
    start = time.perf_counter()
    model, args, kwargs = seeded(entry.small if quick else entry.build)
    yield {"parameters": sum(p.numel() for p in model.parameters()), "build_seconds": time.perf_counter() - start}
    start = time.perf_counter()
    try:
        captured = capture(model, args, kwargs)
    except nm.NMError as error:
        yield {"capture_seconds": time.perf_counter() - start, **_by_mode(model, args, kwargs, error)}
        yield from second_way(model, args, kwargs)
        return
    taken = time.perf_counter() - start
    yield {"capture_seconds": taken, "eval": "yes", "train": "yes", "way": "export"}
    yield {"difference": difference(model, captured[False], args, kwargs)}
    try:
        plan = find(model, [gm for gm, _ in captured.values()], PatternMap.parse("2:4"))
    except nm.NMError as error:
        yield {"planned": 0, "plan_error": str(error)}
        return
    yield {"planned": len(plan.sites), "reasons": _histogram([refusal.reason for refusal in plan.refusals])}
    if capture_only:
        return
    yield axes_row(entry, model, captured)
    start = time.perf_counter()
    with mock.patch("nm_compiler.api.capture", return_value=captured):
        nm.compile(model, args, kwargs)
    yield {"compile_seconds": taken + time.perf_counter() - start}
    del captured, model
    yield law_row(entry, undo)


def second_way(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Row]:
    """What `nm.compile` does with a model that cannot be exported."""
    start = time.perf_counter()
    try:
        sparse = nm.compile(model, args, kwargs)
    except nm.NMError as error:
        yield {"compile_error": str(error)}
        return
    yield {"way": "fragments", "planned": len(sparse.plan.sites), "compile_seconds": time.perf_counter() - start}
    yield {"reasons": _histogram([refusal.reason for refusal in sparse.plan.refusals])}


def difference(model: nn.Module, captured: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The largest absolute difference between the outputs of the evaluation graph and of the model."""
    gm, signature = captured
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention of eager evaluation rounds differently
    with torch.no_grad(), in_mode(model, False):
        expected = pytree.tree_leaves(model(*args, **kwargs, **signature.hidden))
        found = gm(*pytree.tree_leaves((args, {**kwargs, **signature.hidden})))
    pairs = [(f, e) for f, e in zip(pytree.tree_leaves(found), expected, strict=True) if isinstance(e, torch.Tensor)]
    return max((float((f.double() - e.double()).abs().nan_to_num(0.0).max()) for f, e in pairs if e.numel()), default=0.0)


def _by_mode(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: nm.NMError) -> Row:
    """Each mode by itself: a model that is deaf to ``train(mode)`` is captured in the mode that it is kept in."""
    found = {}
    for column, mode in (("eval", False), ("train", True)):
        model.__dict__["train"] = partial(_keep_mode, model, mode)
        try:
            capture(model, args, kwargs)
            found[column] = "yes"
        except Exception as again:
            found[column] = "no"
            found[f"{column}_error"] = str(again)
    return {**found, "error": str(error)}


def _keep_mode(model: nn.Module, mode: bool, asked: bool = True) -> nn.Module:
    return type(model).train(model, mode)


def _histogram(reasons: Sequence[str]) -> Row:
    """Reasons by how often they occur, numbers left out so that equal reasons are equal."""
    return dict(Counter("".join("#" if c.isdigit() else c for c in reason) for reason in reasons).most_common())


HEAD = [
    "model", "weights", "eval", "train", "way", "differs", "planned", "refused", "free inputs", "law error", "unnoticed",
    "capture s", "axes s", "compile s", "peak MiB",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the table; a blank where the model did not get that far."""

    def shown(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    return [
        f"{row['library']}/{row['model']}", shown("parameters", ","), row.get("eval", "no"), row.get("train", "no"),
        row.get("way", ""), shown("difference", ".0e") if row.get("difference") else "", shown("planned", "d"),
        str(sum(row["reasons"].values())) if "reasons" in row else "",
        f"{row['free_input_axes']}/{row['input_axes']}" if "input_axes" in row else "",
        shown("law_error", ".0e") + (" f32" if row.get("law_dtype") == "float32" else ""),
        f"{len(row['undetected'])}/{row['undone']}" if "undone" in row else "", shown("capture_seconds", ".1f"),
        shown("axes_seconds", ".2f"), shown("compile_seconds", ".1f"), shown("peak_mib", ".0f"),
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """A line for each library."""
    kinds = [(library, [row for row in rows if row["library"] == library]) for library in ALL]
    lines = [[library, *_totals(mine)] for library, mine in kinds if mine]
    head = [
        "library", "models", "eval", "train", "second way", "with N:M weights", "equal to the bit", "free inputs",
        "law checked", "law broken", "axes / capture, most", "capture s, median", "compile s, most",
    ]  # fmt: skip
    return table(head, lines)


def _totals(rows: Sequence[Row]) -> list[str]:
    def count(true: Callable[[Row], bool]) -> str:
        return str(sum(map(true, rows)))

    free, every = (sum(row.get(key, 0) for row in rows) for key in ("free_input_axes", "input_axes"))
    share = max((row["axes_seconds"] / row["capture_seconds"] for row in rows if "axes_seconds" in row), default=0)
    took = [row["capture_seconds"] for row in rows if "capture_seconds" in row]
    return [
        str(len(rows)), count(lambda row: row.get("eval") == "yes"), count(lambda row: row.get("train") == "yes"),
        count(lambda row: row.get("way") == "fragments"), count(lambda row: row.get("planned", 0) > 0),
        count(lambda row: row.get("difference", 1) == 0), f"{free}/{every}", count(lambda row: "law_error" in row),
        count(lambda row: row.get("law_holds") is False), f"{share:.0%}", f"{median(took):.1f}" if took else "",
        f"{max((row.get('compile_seconds', 0) for row in rows), default=0):.1f}",
    ]  # fmt: skip


def warm_up() -> None:
    """Import once, before the first fork, what every capture needs."""
    with torch.random.fork_rng(devices=[]):
        permutation_law(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (torch.randn(2, 8),), undo=1)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write after every model."""
    parser = arguments("Which models can be compiled", Path(__file__).stem)
    parser.add_argument("--only", default="*", help="a glob over names")
    parser.add_argument("--library", choices=ALL, help="one library instead of all")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON has, and measure the others")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one model")
    parser.add_argument("--capture-only", action="store_true", help="neither axes nor nm.compile")
    parser.add_argument("--undo", type=int, default=12, help="axes of each model to undo one at a time")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    started = environment(given.threads) | {library: version(library) for library in LIBRARIES}
    chosen = [entry for entry in listed(given.library) if fnmatch.fnmatch(entry.name, given.only)]
    rows: dict[str, Row] = {}
    if given.resume and given.out.exists():
        rows = {f"{row['library']}/{row['model']}": row for row in json.loads(given.out.read_text())["models"]}
    chosen = [entry for entry in chosen if str(entry) not in rows]
    work = partial(measure, quick=given.quick, capture_only=given.capture_only, undo=given.undo)
    warm_up()
    for entry, found in each(work, chosen, jobs=given.jobs, timeout=given.timeout):
        row = {"library": entry.library, "model": entry.name, **found, "commit": started["commit"]}
        rows[str(entry)] = row  # those that --resume keeps may be of another commit
        print("  ".join(cells(row)), row.get("error", "").replace("\n", " ")[:200], flush=True)
        _keep(given.out, started, rows)
    ordered = sorted(rows.values(), key=lambda row: (ALL.index(row["library"]), row["model"]))
    print(f"\n{table(HEAD, [cells(row) for row in ordered])}\n\n{summary(ordered)}")
    write(given.out, started, {"models": ordered})


def _keep(path: Path, started: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """The result so far: an interrupted run goes on with --resume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": started, "models": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
