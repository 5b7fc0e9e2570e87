"""Prune a checkpoint folder into another one, once and for all, in memory for two layers at most.

    for every shard:    header as it is | tensor by tensor: read a part, zero what the pattern does not keep, write it
                        read back, verify, flush to disk, rename
    then:               config and tokenizer files | the index, last

Names, shapes, dtypes and the place of every byte stay, so the result loads wherever the original did.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path

from torch import Tensor, nn

from nm_compiler.errors import NMError, Refusal
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.runtime.verify import verify
from nm_compiler.sites.plan import Plan, Site
from nm_compiler.streaming.folder import Folder, read_folder
from nm_compiler.streaming.journal import digest, fingerprint, read_journal, write_journal
from nm_compiler.streaming.judging import Judge, check_rule
from nm_compiler.streaming.meta_model import meta_model
from nm_compiler.streaming.ordering import Ordering, find_axes, find_orders, load_orders, save_orders
from nm_compiler.streaming.parts import copy_bytes, parts, read_whole, write_tensor
from nm_compiler.streaming.planning import plan_tensors
from nm_compiler.streaming.statistics import read_norms
from nm_compiler.streaming.tensor_file import Entry, TensorFile, read_tensor_file
from nm_compiler.streaming.whole import alone, sweep, whole
from nm_compiler.wording import several

_ROOM = 1 << 24  # bytes kept free beside what is written

Listener = Callable[[str, str, int], object]
"""Told (shard, tensor, bytes) after every tensor that was written."""


@dataclass(frozen=True)
class Pruned:
    """What `prune_checkpoint` did. Print it; pruned: by weight, the axis along which it is N:M.

    shards, went_on: written in all, and of them by a run before this one; left: files of the checkpoint that were not taken
    over; basis: what the plan was made from; orders: by class of channels, as `nm_compiler.permute` takes
    them; notes: on them.
    """

    out: Path
    patterns: PatternMap
    pruned: Mapping[str, int]
    refusals: tuple[Refusal, ...]
    shards: int
    went_on: int
    left: tuple[str, ...]
    basis: str
    orders: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.out}: {len(self.pruned)} weights are {self.patterns}, verified; planned from {self.basis}"]
        reasons: dict[str, list[str]] = {}
        for refusal in self.refusals:
            reasons.setdefault(refusal.reason, []).append(refusal.where)
        for reason, names in reasons.items():
            lines.append(f"  dense: {several(names, 3)}: {reason}")
        lines += [f"  {note}" for note in self.notes]
        if self.went_on:
            lines.append(f"  {self.went_on} of {self.shards} shards were there from a run before")
        if self.left:
            lines.append(f"  not taken over: {', '.join(self.left)}")
        return "\n".join(lines)


def prune_checkpoint(
    checkpoint: str | Path, out: str | Path, *, pattern: PatternSpec = "2:4", importance: str = "magnitude",
    statistics: str | Path | None = None, include: Sequence[str] = (), exclude: Sequence[str] = (),
    permute: bool = False, budget_s: float | None = None, seed: int = 0, progress: Listener | None = None,
) -> Pruned:  # fmt: skip
    """One-shot N:M pruning of a Hugging Face checkpoint folder of any size, into the folder ``out``.

    The weight of every linear gets zeros where ``pattern`` keeps nothing; all else is copied as it is. No model is run, and
    memory holds a few megabytes of a weight at a time.

    checkpoint: a folder with model.safetensors, or with shards and their index.
    out: a folder that is new or empty, or that of a run that was cut off.
    pattern: ``"2:4"``, ``(2, 4)``, or globs over tensor names, first match wins: ``{"*.mlp.*": "1:4", "*": "2:4"}``.
    importance: what a weight is kept by: ``"magnitude"``, or ``"wanda"`` or ``"ria"``, which go by inputs as well.
    statistics: for these two, a file with the norms of every weight's inputs, which `nm_compiler.calibrate` and ``save`` make.
    include, exclude: globs over tensor names; include takes in what stays dense by its name (embeddings, heads, routers,
    norms: `nm_compiler.streaming.planning`), exclude wins.
    permute: True first puts coupled channels in an order in which masks keep more, as `nm_compiler.permute` does. The axes
    come from the model that config.json describes, captured without values; weights are read a class of channels at a time.
    A class that would need more memory than two layers keeps its order, and a note says so.
    budget_s (seconds), seed: of that search.
    progress: called with (shard, tensor, bytes) after every tensor that was written.

    Returns a `Pruned`, which says what is N:M and why the rest is not.
    A run that was killed, or met a full disk, goes on where it was when it is called again the same way: shards take their
    place only when they are whole and `nm_compiler.verify` has read them back, and the index comes last.
    Raises NMError before anything is written: a missing or damaged shard, a tensor listed twice, folders inside each other,
    an ``out`` that holds something else, a disk too full, nothing to prune, options out of range.
    """
    source, target = Path(checkpoint), Path(out)
    patterns = PatternMap.parse(pattern)
    check_rule(importance, statistics is not None)
    _check_search(permute, budget_s)
    _check_places(source, target)
    folder = read_folder(source)
    model = meta_model(folder.path, folder.config())
    plan, basis = plan_folder(folder, patterns, model, include=include, exclude=exclude)
    norms = {} if statistics is None else read_norms(Path(statistics), plan.sites)
    settings = {
        "source": fingerprint(folder), "pattern": str(patterns), "importance": importance,
        "statistics": None if statistics is None else digest(Path(statistics)),
        "permute": [seed, budget_s] if permute else None,
        "weights": {site.name: [str(site.pattern), site.in_axis] for site in plan.sites},
    }  # fmt: skip
    journal = read_journal(target, settings)
    there = {shard.path.name for shard in folder.shards if journal and _is_whole(target / shard.path.name, shard)}
    _check_room(target, sum(shard.nbytes for shard in folder.shards if shard.path.name not in there))
    judge, sites = Judge(importance, norms), {site.name: site for site in plan.sites}
    ordering = _ordering(folder, plan, model, judge, target, journal, seed, budget_s) if permute else None
    _make(target)
    with alone(target):
        sweep(target)
        if journal is None:
            write_journal(target, {"settings": settings, "complete": False})
        if ordering is not None:
            save_orders(ordering, target)
        for path in folder.beside:
            _copy(path, target)
        for shard in folder.shards:
            if shard.path.name not in there:
                _write_shard(shard, target / shard.path.name, sites, judge, ordering, progress)
        if folder.index is not None:
            _copy(folder.index, target)
        dense = {refusal.where: refusal.reason for refusal in plan.refusals}
        write_journal(target, {"settings": settings, "complete": True, "basis": basis, "dense": dense})
    left = tuple(sorted(path.name for path in folder.left))
    pruned = {site.name: site.in_axis for site in plan.sites}
    orders, notes = (ordering.orders, ordering.notes) if ordering else ({}, ())
    return Pruned(target, patterns, pruned, plan.refusals, len(folder.shards), len(there), left, basis, orders, notes)


def plan_folder(
    folder: Folder, patterns: PatternMap, model: nn.Module | str, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[Plan, str]:
    """The plan of a checkpoint, and in words what it was made from. model: of `meta_model`. Raises NMError."""
    known, why = (None, f"names ({model})") if isinstance(model, str) else (model, f"the modules of {type(model).__name__}")
    globs = [(given,) if isinstance(given, str) else tuple(given) for given in (include, exclude)]
    kind = str(folder.config().get("model_type", ""))
    return plan_tensors(folder.entries, patterns, model=known, model_type=kind, include=globs[0], exclude=globs[1]), why


def _write_shard(
    shard: TensorFile, target: Path, sites: Mapping[str, Site], judge: Judge, ordering: Ordering | None,
    progress: Listener | None,
) -> None:  # fmt: skip
    with whole(target, check=partial(_check, shard=shard, sites=sites)) as file:
        file.write(shard.header)
        with _opened(shard.path) as source:
            for entry in shard.entries:
                site = sites.get(entry.name)
                if ordering is not None and ordering.moves(entry.name):
                    values, moved = read_whole(shard.path, entry), partial(ordering.moved, entry.name)
                    write_tensor(file, judge.pruned_whole(site, values, moved) if site else moved(values))
                elif site is None or 0 in entry.shape:
                    copy_bytes(source, entry, file)
                else:
                    for values in judge.pruned(site, partial(_parts, source, entry, site)):
                        write_tensor(file, values)
                if progress is not None:
                    progress(shard.path.name, entry.name, entry.nbytes)


def _ordering(
    folder: Folder, plan: Plan, model: nn.Module | str, judge: Judge, target: Path, journal: object, seed: int,
    budget_s: float | None,
) -> Ordering:  # fmt: skip
    """The orders of the run before, or searched ones."""
    known, axes = find_axes(model)
    before = load_orders(folder, known, axes, target) if journal else None
    return before or find_orders(folder, plan, known, axes, judge.worth_whole, seed=seed, budget_s=budget_s)


def _parts(source: FileIO, entry: Entry, site: Site) -> Iterator[tuple[slice, Tensor]]:
    return parts(source, entry, multiple=site.pattern.m if site.in_axis == 0 else 1)


def _check(half: Path, shard: TensorFile, sites: Mapping[str, Site]) -> None:
    """Read a written shard back: as long as the original, its header, and N:M where it should be. Raises NMError."""
    written = read_tensor_file(half)
    if written.header != shard.header:
        raise NMError(f"{half} does not read back as it was written: the disk may be failing")
    with _opened(half) as file:
        for entry in written.entries:
            site = sites.get(entry.name)
            if site is None or 0 in entry.shape:
                continue
            for _, values in _parts(file, entry, site):
                found = verify({entry.name: values}, site.pattern)
                if site.in_axis not in found.satisfied.get(entry.name, ()):
                    raise NMError(f"{entry.name} does not read back as {site.pattern} from {half}: the disk may be failing")


def _opened(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise NMError(f"{path} cannot be read: {error}") from error


def _is_whole(path: Path, shard: TensorFile) -> bool:
    try:
        return read_tensor_file(path).header == shard.header
    except NMError:
        return False


def _copy(path: Path, target: Path) -> None:
    with whole(target / path.name) as file, _opened(path) as source:
        shutil.copyfileobj(source, file)


def _make(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NMError(f"{target} cannot be made: {error}") from error


def _check_search(permute: bool, budget_s: float | None) -> None:
    if permute not in (True, False):
        raise NMError(f"permute={permute!r}: say permute=True, which searches for an order; others are for nm.permute")
    if not permute and budget_s is not None:
        raise NMError(f"budget_s={budget_s} is the time of an order search: it goes with permute=True")


def _check_places(source: Path, target: Path) -> None:
    one, other = source.resolve(), target.resolve()
    if one == other:
        raise NMError(f"{target} is the checkpoint itself: give another folder to write to")
    if one in other.parents:
        raise NMError(f"{target} lies inside the checkpoint {source}: give a folder outside")
    if other in one.parents:
        raise NMError(f"the checkpoint {source} lies inside {target}: give another folder to write to")


def _check_room(target: Path, needed: int) -> None:
    at = target.resolve()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if needed and free < needed + _ROOM:
        raise NMError(f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room, or give another disk")
    if not os.access(at, os.W_OK):
        raise NMError(f"{at} cannot be written to: give another folder")
