"""Bi-Mask's backward order: which output rows share a backward group.

`assignment_search` is what training calls every hundred steps, `search_backward_order` the thorough search for a weight.
Any function with the signature of `OrderSearch` can take the first one's place (`BiMask(search=...)`).
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.neighbourhood import Neighbourhood
from nm_compiler.solvers.search import search_order
from nm_compiler.solvers.search_budget import Listener

_AT_ONCE = 64  # slots refilled in a round: more is better only with more time than training should give


class OrderSearch(Protocol):
    """What `BiMask(search=...)` expects."""

    def __call__(self, importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
        """Return an order at least as good as ``order`` and as the identity.

        importance: ``[rows, columns]``, non-negative; order: int64 ``[rows]``, ``rows`` a multiple of ``m``.
        moves: budget in slots that get a row anew, so that a run is reproducible. Returns int64 ``[rows]``.
        """


def kept_importance(importance: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """Sum over groups of ``m`` consecutive rows (after ``order``) and over columns of the ``n`` largest entries."""
    groups: Tensor = importance[order].unflatten(0, (-1, m))
    return groups.topk(n, dim=1).values.sum(dtype=torch.float64)


def assignment_search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
    """Take a random slot out of up to 64 random groups and refill them all at once, optimally, again and again.

    Begins at the better of ``order`` and the identity and ends after ``moves`` slots, or earlier when as many rounds as
    there are groups bring nothing. Never worse than either start; deterministic for a seed. Shapes as in `OrderSearch`;
    it runs on the CPU, the result is on the importance's device.
    """
    device, order = importance.device, order.cpu()
    values = importance.detach().cpu()
    values = values if values.dtype == torch.float64 else values.float()
    starts = (order, torch.arange(len(order)))
    best = max(starts, key=lambda start: float(kept_importance(values, start, n, m)))
    groups, mean = len(order) // m, float(values.double().mean()) if values.numel() else 0.0
    if groups < 2 or not 0.0 < mean < float("inf") or moves < 1:
        return best.to(device)
    columns = (values / mean).float().contiguous().numpy()
    engine = Neighbourhood(columns, best.numpy(), Pattern(n, m), seed % 2**64, at_once=_AT_ONCE)
    count, idle = min(_AT_ONCE, groups), 0
    for _ in range(-(-moves // count)):
        before = engine.gained
        engine.step(1.0, 1)
        idle = 0 if engine.gained > before else idle + 1
        if idle > groups:
            break
    # gains are sums in another order than the total: where rounding fooled them, the start is still at hand
    ends = (best, torch.from_numpy(engine.best))
    return max(ends, key=lambda end: float(kept_importance(values, end, n, m))).to(device)


def search_backward_order(
    weight: Tensor,
    *,
    pattern: str | tuple[int, int] | Pattern,
    objective: Literal["magnitude", "count"] = "magnitude",
    order: ArrayLike | Tensor | None = None,
    budget_s: float | None = None,
    moves: int | None = None,
    seed: int = 0,
    progress: Listener | None = None,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Search the order of output rows under which the backward mask keeps the most of the forward-masked weight.

    weight: ``[out, .., in]``, forward groups along the last axis. objective: the sum of kept magnitudes, or how many are
    kept (the paper's). order: to begin with, the identity if left out; the others as in `search_order`.

    Returns int64 ``[out]``, no worse than the identity and than ``order``. Raises NMError, as `search_order` does, and if
    M does not divide both axes. Ref: Bi-Mask, section 3.3.
    """
    nm = Pattern.parse(pattern)
    if objective not in ("magnitude", "count"):
        raise NMError(f"objective={objective!r}: choose 'magnitude' or 'count'")
    if weight.ndim < 2 or weight.shape[-1] % nm.m or weight.shape[0] % nm.m:
        raise NMError(f"a weight of shape {list(weight.shape)}: {nm.m} must divide its first and its last axis")
    values = weight.detach().cpu()
    mask = magnitude_mask(values, nm.n, nm.m, -1)
    importance = mask.float() if objective == "count" else torch.where(mask, values.abs(), values.new_zeros(()))
    matrix = importance.flatten(1).T
    return search_order(matrix, pattern=nm, budget_s=budget_s, moves=moves, seed=seed, start=order, progress=progress)
