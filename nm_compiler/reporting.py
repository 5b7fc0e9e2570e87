"""Collect the report of a compiled or frozen model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from nm_compiler.carrier import Carrier
from nm_compiler.pattern import PatternLike, PatternSpec
from nm_compiler.runtime.lowered import Lowered
from nm_compiler.runtime.report import Report, Row
from nm_compiler.runtime.verify import verify
from nm_compiler.sites.plan import Plan
from nm_compiler.solvers.check import worst_group
from nm_compiler.state.beside import Weight, of_another
from nm_compiler.unwrapping import carrier_in, compiled_parts
from nm_compiler.wording import several


def report(model: nn.Module, pattern: PatternSpec | None = None) -> Report:
    """A line for every weight of two or more axes: sparse or dense, why, and what its mask keeps now.

    model: what `compile` returned, also inside DDP or ``torch.compile``; what `lower` or `lower_parts` returned, where rows
    say what runs the weight, how fast, or why it stays dense; or a plain or frozen module, which may hold compiled ones.
    pattern: what to look for in a plain module, as in `nm_compiler.compile`, "2:4" if left out; a compiled one knows its own.

    Returns a `Report` to print, or to turn into plain values (``to_dict()``) or a page (``to_html()``).
    """
    if isinstance(model, Lowered):
        return _lowered(model)
    module = carrier_in(model)
    if module is None:
        return _plain(model, pattern or "2:4")
    if module.frozen:
        return _plain(module.origin, pattern or _own_patterns(module.plan))
    return _compiled(module)


def _compiled(module: Carrier) -> Report:
    rows = {refusal.where: _refused(module, refusal.where, refusal.reason) for refusal in module.plan.refusals}
    names = {weight.site.name for weight in module.weights} & set(module.late)
    rows |= {w.site.name: _planned(module, w) for w in module.weights if w.site.name not in names}
    rows |= {name: _late(module, name) for name in names}
    title = f"{type(module.origin).__name__} with {module.method.brief()}"
    return Report(title, tuple(rows[name] for name in module.plan.shapes), module.notes)


def _lowered(model: Lowered) -> Report:
    """A row a product, and one for every weight that no product of the lowered graph reads."""
    result, rows = model.result, dict[str, list[Row]]()
    seen = set[tuple[str, bool]]()
    for product in result.products:
        site, found = product.site, result.decisions[product.node]
        size = math.prod(site.shape) * product.dtype.itemsize
        whole = math.prod(site.shape) == math.prod(model.plan.shapes[site.name])  # not a slice of it
        before, held = rows.setdefault(site.name, []), (site.name if whole else product.read, bool(found.kernel))
        name = site.name if not before else f"{site.name} [{len(before)}]"
        before.append(
            Row(
                name, site.op, site.shape, str(site.pattern), "sparse" if found.kernel else "dense",
                found.kernel or "; ".join(found.reasons), eligible=found.eligible, kernel=found.kernel or None,
                dense_ms=None if found.dense_s is None else 1e3 * found.dense_s,
                sparse_ms=None if found.sparse_s is None else 1e3 * found.sparse_s,
                bytes=size if found.bytes is None else found.bytes, hint=found.hint or None,
                again=held in seen, of=site.name,
            )
        )  # fmt: skip
        seen.add(held)
    for name, why in model.unread.items():
        site = model.sites[name]
        rows[name] = [Row(name, site.op, site.shape, str(site.pattern), "dense", why, eligible=False)]
    for name, reason in model.dense.items():
        rows[name] = [Row(name, model.plan.ops[name], model.plan.shapes[name], None, "dense", reason, eligible=False)]
    checked = () if model.error is None else (f"Checked against the model: outputs differ by {model.error:.1e} (relative).",)
    ordered = tuple(row for name in model.plan.shapes for row in rows[name])
    return Report(f"{model.title} on {model.backend}", ordered, (*model.notes, *_shared(rows), *result.notes, *checked))


def _shared(rows: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """A note on weights of several rows."""
    shared = [f"{name} by {len(found)}" for name, found in rows.items() if len(found) > 1]
    if not shared:
        return ()
    return (f"Rows numbered [1], [2], .. are of the same tensor, read by several products: {several(shared, 3)}.",)


def _refused(module: Carrier, name: str, reason: str) -> Row:
    return Row(name, module.plan.ops[name], module.plan.shapes[name], None, "dense", module.late.get(name, reason))


def _late(module: Carrier, name: str) -> Row:
    """A weight with state that no call has read: dense so far."""
    return _refused(module, name, module.late[name])


def _planned(module: Carrier, weight: Weight) -> Row:
    site = weight.site
    if weight.param.is_meta:
        return Row(
            site.name, site.op, site.shape, str(site.pattern), "sparse", f"{site.pattern} along the input axis; no values yet"
        )
    forward, backward = module.masked(site.name)
    total, kept = _magnitude(weight.value), _magnitude(forward)
    reason = module.method.remark(weight) or f"{site.pattern} along the input axis"
    fullest = worst_group(forward, site.pattern.m, site.in_axis)
    if fullest > site.pattern.n:
        reason += f"; not {site.pattern} yet: its mask keeps up to {fullest} of {site.pattern.m}"
    return Row(
        site.name, site.op, site.shape, str(site.pattern), "sparse", reason,
        retained=kept / total if total else 1.0,
        backward_kept=None if backward is None else (_magnitude(backward) / kept if kept else 1.0),
        live=module.method.live(weight),
        nonzero=float((forward != 0).double().mean()),
        runs=module.runs(site.name),
    )  # fmt: skip


def _magnitude(weight: Tensor) -> float:
    return float(weight.abs().sum(dtype=None if weight.dtype.itemsize > 4 else weight.double().dtype))


def _own_patterns(plan: Plan) -> PatternSpec:
    """The pattern of a frozen model's weights, or, where they differ, that of each."""
    own: dict[str, PatternLike] = {site.name: site.pattern for site in plan.sites}
    return own if len(set(own.values())) > 1 else plan.sites[0].pattern


def _plain(model: nn.Module, pattern: PatternSpec) -> Report:
    rows, found, lowered = [], verify(model, pattern), _lowered_in(model)
    for checked in found.weights:
        if any(checked.name.startswith(f"{part}.") for part in lowered):
            continue
        owner = model.get_submodule(checked.name.rpartition(".")[0])
        sparse = bool(checked.axes)
        along = " and ".join(map(str, checked.axes))
        reason = f"{checked.pattern} along axis {along}" if sparse else f"not {checked.pattern} along any axis"
        if checked.pattern is None:
            reason = f"no rule of pattern={found.pattern} matches it: add one"
        shown, status = (str(checked.pattern), "sparse") if sparse else (None, "dense")
        op = type(owner).__name__
        rows.append(Row(checked.name, op, checked.shape, shown, status, reason, nonzero=checked.nonzero))
    plain = Report(f"{type(model).__name__}, checked for {found.pattern}", tuple(rows))
    return _with_parts(_with_lowered(plain, model, lowered), model)


def _lowered_in(model: nn.Module) -> dict[str, Lowered]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Lowered)}


def _with_lowered(plain: Report, model: nn.Module, lowered: Mapping[str, Lowered]) -> Report:
    """The report of a plain module with those of its lowered parts, and the notes that all of them share."""
    if not lowered:
        return plain
    parts = {name: _lowered(part) for name, part in lowered.items()}
    places = {name: at for at, (name, _) in enumerate(model.named_modules())}
    rows = [(places[row.name.rpartition(".")[0]], _outside(row)) for row in plain.rows]
    for name, part in parts.items():
        rows += [
            (places[name], replace(row, name=f"{name}.{row.name}", of=row.of and f"{name}.{row.of}")) for row in part.rows
        ]
    first, *others = parts
    notes = [note for note in parts[first].notes if all(note in parts[other].notes for other in others)]
    errors = [part.error for part in lowered.values() if part.error is not None]
    if errors:
        notes.append(f"Checked against the model, part by part: outputs differ by up to {max(errors):.1e} (relative).")
    hooked = [name for part in lowered.values() for name in part.hooked]
    if hooked:
        notes.append(
            f"Forward hooks of {several(hooked, 3)}: what they compute is in the graph, which does not call them again."
        )
    notes.append(f"Of one part, with its own notes: nm.report(model.get_submodule({first!r})).")
    backends = " and ".join(sorted({part.backend for part in lowered.values()}))
    title = f"{plain.title}, {len(parts)} part{'s' * (len(parts) > 1)} on {backends}"
    return Report(title, tuple(row for _, row in sorted(rows, key=lambda pair: pair[0])), tuple(notes))


def _outside(row: Row) -> Row:
    """That of a weight in no lowered part: torch multiplies with its zeros."""
    if row.status == "dense":
        return row
    return replace(row, status="dense", reason=f"{row.reason}, but in no part that was lowered")


def _with_parts(plain: Report, model: nn.Module) -> Report:
    """The report of a plain module with that of each compiled one in it: by masks and reasons, not by the zeros there are."""
    title, rows = plain.title, list(plain.rows)
    parts = {name: _compiled(carrier) for name, carrier in compiled_parts(model).items() if not carrier.frozen}
    for name, part in parts.items():
        at = next((i for i, row in enumerate(rows) if row.name.startswith(f"{name}.")), len(rows))
        rows = [row for row in rows if not row.name.startswith(f"{name}.")]
        rows[at:at] = [replace(row, name=f"{name}.{row.name}") for row in part.rows]
        title += f"; {name!r} is a {part.title}"
    notes = (*plain.notes, *(note for part in parts.values() for note in part.notes), *_of_another(model, parts))
    return Report(title, tuple(rows), notes)


def _of_another(model: nn.Module, parts: Iterable[str]) -> tuple[str, ...]:
    """A note on layers of a compiled model that is not in ``model``: their masks are not told from here."""
    theirs = of_another(model, parts)
    if not theirs:
        return ()
    told = "part of a model that nm.compile returned, whose masks are not in these values: report that one"
    return (f"{several(theirs, 3)}: {told}.",)
