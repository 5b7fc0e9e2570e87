"""The order of passes, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass
from nm_compiler.methods.base import Method
from nm_compiler.methods.bimask import BiMask
from nm_compiler.methods.lbc import LBC
from nm_compiler.methods.magnitude import Magnitude
from nm_compiler.methods.srste import SRSTE
from nm_compiler.passes.check_pattern import check_pattern
from nm_compiler.passes.freeze_masks import freeze_masks
from nm_compiler.passes.insert_bimask import insert_bimask
from nm_compiler.passes.insert_fixed_masks import insert_fixed_masks
from nm_compiler.passes.insert_scores import insert_scores
from nm_compiler.passes.insert_srste import insert_srste
from nm_compiler.sites import Site


def pipeline(method: Method, sites: Sequence[Site]) -> list[Pass]:
    """What turns a captured graph into a sparse one that trains with ``method``."""
    match method:
        case LBC(by_position=by_position):
            return [partial(insert_scores, sites=sites, by_position=by_position)]
        case BiMask(decay=decay):
            return [partial(insert_srste, sites=sites, decay=decay), partial(insert_bimask, sites=sites)]
        case SRSTE(decay=decay):
            return [partial(insert_srste, sites=sites, decay=decay)]
        case Magnitude():
            return [partial(insert_fixed_masks, sites=sites)]
    if isinstance(method, type) and issubclass(method, Method):
        raise NMError(f"method={method.__name__} is the class: did you mean nm.{method.__name__}()?")
    raise NMError(f"method={method!r}: choose nm.LBC(), nm.BiMask(), nm.SRSTE() or nm.Magnitude()")


def freezing(sites: Sequence[Site]) -> list[Pass]:
    """What turns a trained sparse graph into a plain one with zeros in its weights."""
    return [freeze_masks, partial(check_pattern, sites=sites)]
