"""`nm.compile` without example inputs: the model itself, with the state of its weights and entries for its calls."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from nm_compiler.backend import check_then
from nm_compiler.capture.preparing import check_model
from nm_compiler.errors import NMError
from nm_compiler.live.prepared import Prepared
from nm_compiler.methods.base import Method
from nm_compiler.pattern import PatternMap
from nm_compiler.sites.plan import check_globs
from nm_compiler.state.attaching import check_weights

M = TypeVar("M", bound=nn.Module)


def prepare(
    model: M, method: Method, patterns: PatternMap, *, include: tuple[str, ...], exclude: tuple[str, ...], seed: int, then: str
) -> M:
    """Make ``model`` a live one: it is changed in place and returned. then: what runs the rewritten graphs, one of `THEN`.

    Raises NMError, the model unchanged, if nothing can be N:M or if the method needs a graph first.
    """
    if method.folds:
        raise NMError(
            f"{method} puts channels in another order, which needs a graph: nm.permute(model, (x,)) first, or inputs"
        )
    check_then(then)
    check_model(model, "nm.compile")
    check_globs(model, patterns, include, exclude)
    made = Prepared(model, method, patterns, include=include, exclude=exclude, seed=seed, then=then)
    if not made.candidates:
        raise NMError(
            f"no weight of this {type(model).__name__} can be {patterns}: none of its layers has inputs that M divides, "
            "or exclude= names them all"
        )
    check_weights(model, made.candidates.values(), method)
    made.attach()
    return model
