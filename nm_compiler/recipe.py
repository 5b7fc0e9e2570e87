"""The order of passes: those of the method, and at the end those that freeze."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any

from torch.fx import GraphModule

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass, rewritten
from nm_compiler.methods.base import Method, spelled
from nm_compiler.passes.check_masked import check_masked
from nm_compiler.passes.freeze_masks import freeze_masks
from nm_compiler.sites.plan import Site


def pipeline(method: Method, sites: Sequence[Site]) -> list[Pass]:
    """What turns a captured graph into a sparse one that trains with ``method``. Raises NMError for what is no method."""
    if isinstance(method, Method):
        if not is_dataclass(method):
            raise NMError(f"{method.name} is no dataclass, so its options are unknown: put @dataclass(frozen=True) above it")
        passes: Any = method.passes(sites)
        if not isinstance(passes, (list, tuple)):
            raise NMError(f"{method.name}.passes() gives {type(passes).__name__}: let it return its passes as a list")
        return [*passes[:-1], partial(_finish, last=passes[-1:], sites=sites, by=method.name)]
    if isinstance(method, type) and issubclass(method, Method):
        raise NMError(f"method={method.__name__} is the class: did you mean {spelled(method)}()?")
    raise NMError(
        f"method={method!r}: choose nm.LBC(), nm.BiMask(), nm.SRSTE(), nm.Magnitude(), nm.Transposable(), nm.LBCBiMask(), "
        "nm.Gradual() or nm.SSTE()"
    )


def _finish(gm: GraphModule, *, last: Sequence[Pass], sites: Sequence[Site], by: str) -> GraphModule:
    """The last pass of a method, if it has any, and the check that nothing was left out: one pass, tidied up after once."""
    for each in last:
        gm = rewritten(each, gm)
    return check_masked(gm, sites=sites, by=by)


def freezing() -> list[Pass]:
    """What turns a trained sparse graph into a plain one, over weights that will hold what their masks leave of them."""
    return [partial(freeze_masks, apart=True)]
