"""State that is made of a weight at `compile`, such as a mask that is chosen once, and what is written to the weight later.

    nm.compile(model, .., method=nm.Magnitude())     the mask of the values that the weight has
    sparse.apply(init_weights)                       other values under that mask: the log says so
    sparse.load_state_dict(dense)                    a mask of its own, as at `compile`

A tensor counts its changes in place, so state is made again, and compared, only for a weight that was written before the first
scheduler was made, and that no backward pass has reached.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from nm_compiler.carrier import Carrier
from nm_compiler.methods.base import state_of
from nm_compiler.state.beside import Weight, learns
from nm_compiler.state.sharding import is_sharded
from nm_compiler.wording import several

_log = logging.getLogger(__name__)


def counted(weights: Iterable[Weight]) -> dict[str, int]:
    """How often each weight has been written; those without such a count are left out."""
    return {each.site.name: each.param._version for each in weights if not each.param.is_inference()}


def tell_stale(carrier: Carrier) -> None:
    """Log which weights hold other values than their state was made of, where that makes a difference."""
    if carrier.made_of is None or carrier.loads or carrier.progress is not None:
        return
    now = counted(carrier.weights)
    written = [each for each in carrier.weights if now.get(each.site.name) != carrier.made_of.get(each.site.name)]
    stale = [each.site.name for each in written if _is_stale(carrier, each)]
    if stale:
        _log.warning(
            "%s: written after nm.compile, which chose what %s keeps of the values before. Initialise or load weights first, "
            "or load them into the whole compiled model with load_state_dict(), which chooses anew",
            several(stale, 3), carrier.method.name,
        )  # fmt: skip


@torch.no_grad()
def _is_stale(carrier: Carrier, weight: Weight) -> bool:
    if weight.param.is_meta or is_sharded(weight.param) or weight.param.grad is not None:
        return False
    fresh = state_of(carrier.method, weight.site, weight.value)
    return any(not learns(weight[suffix]) and not torch.equal(value, weight[suffix]) for suffix, value in fresh.items())
