"""Collect the report of a compiled or frozen model."""

from __future__ import annotations

from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.module import SparseModule, unwrap
from nm_compiler.pattern import PatternLike
from nm_compiler.runtime.report import Report, Row
from nm_compiler.runtime.verify import verify
from nm_compiler.state import Weight


def report(model: nn.Module, pattern: PatternLike | None = None) -> Report:
    """A line for every weight of two or more axes: sparse or dense, why, and what its mask keeps now.

    model: what `compile` returned (also inside DDP or ``torch.compile``), or a plain or frozen module; then ``pattern``
    says what to look for ("2:4" if left out).
    """
    try:
        module = unwrap(model)
    except NMError:
        return _plain(model, pattern or "2:4")
    if module.frozen:
        return _plain(module.origin, pattern or module.plan.sites[0].pattern)
    rows = {refusal.where: _refused(module, refusal.where, refusal.reason) for refusal in module.plan.refusals}
    rows |= {weight.site.name: _planned(module, weight) for weight in module.weights}
    title = f"{type(module.origin).__name__} with {module.method}"
    return Report(title, tuple(rows[name] for name in module.plan.shapes), module.notes)


def _refused(module: SparseModule, name: str, reason: str) -> Row:
    return Row(name, module.plan.ops[name], module.plan.shapes[name], None, "dense", module.late.get(name, reason))


def _planned(module: SparseModule, weight: Weight) -> Row:
    site = weight.site
    if weight.param.is_meta:
        return Row(
            site.name, site.op, site.shape, str(site.pattern), "sparse", f"{site.pattern} along the input axis; no values yet"
        )
    forward, backward = module.masked(site.name)
    total, kept = _magnitude(weight.param.detach()), _magnitude(forward)
    return Row(
        site.name, site.op, site.shape, str(site.pattern), "sparse",
        module.method.remark(weight) or f"{site.pattern} along the input axis",
        retained=kept / total if total else 1.0,
        backward_kept=None if backward is None else (_magnitude(backward) / kept if kept else 1.0),
        live=module.method.live(weight),
        nonzero=float((forward != 0).double().mean()),
    )  # fmt: skip


def _magnitude(weight: Tensor) -> float:
    return float(weight.abs().sum(dtype=None if weight.dtype.itemsize > 4 else weight.double().dtype))


def _plain(model: nn.Module, pattern: PatternLike) -> Report:
    rows = []
    for checked in verify(model, pattern).weights:
        owner = model.get_submodule(checked.name.rpartition(".")[0])
        sparse = bool(checked.axes)
        along = " and ".join(map(str, checked.axes))
        reason = f"{pattern} along axis {along}" if sparse else f"not {pattern} along any axis"
        shown, status = (str(pattern), "sparse") if sparse else (None, "dense")
        op = type(owner).__name__
        rows.append(Row(checked.name, op, checked.shape, shown, status, reason, nonzero=checked.nonzero))
    return Report(f"{type(model).__name__}, checked for {pattern}", tuple(rows))
