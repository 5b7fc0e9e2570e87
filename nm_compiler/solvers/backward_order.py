"""Bi-Mask's backward order: which output rows share a backward group.

`quick_search` is what training calls every hundred steps, for many weights by `search_all`; `search_backward_order` is the
thorough search for a weight. Any function with the signature of `OrderSearch` can take the first one's place
(`BiMask(search=...)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers import masks
from nm_compiler.solvers.device_order import exchanged
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.neighbourhood import Neighbourhood
from nm_compiler.solvers.order_launch import Problem, searched
from nm_compiler.solvers.search import search_order
from nm_compiler.solvers.search_budget import Listener

_TOGETHER = 1 << 25  # numbers of weights that are searched together: so many are in memory three times over
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


def quick_search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
    """What `BiMask` takes: `exchange_search` for importance that lies on a GPU, `assignment_search` for all other.

    Shapes as in `OrderSearch`.
    """
    search = exchange_search if importance.is_cuda else assignment_search
    return search(importance, order, n, m, moves=moves, seed=seed)


def search_all(search: OrderSearch, problems: Sequence[Problem], *, moves: int) -> list[Tensor]:
    """The order that ``search`` finds for every problem; exchanges on a GPU for all of them at once, to the same result.

    problems: their importance all on one device; no more numbers than `together` says, or it takes much memory.
    """
    if problems and _by_exchange(search, problems[0].importance) and all(_has_kernels(each.importance) for each in problems):
        return searched([_real_problem(each) for each in problems], moves=moves)
    return [search(each.importance, each.order, each.n, each.m, moves=moves, seed=each.seed) for each in problems]


def together(search: OrderSearch, weight: Tensor) -> int:
    """How many numbers it pays to give to `search_all` at once where ``weight`` lies; 0: a weight at a time."""
    return _TOGETHER if _by_exchange(search, weight) and masks.on_gpu(weight) else 0


def _by_exchange(search: OrderSearch, tensor: Tensor) -> bool:
    return search is exchange_search or (search is quick_search and tensor.is_cuda)


def _has_kernels(tensor: Tensor) -> bool:
    """Whether its order can be searched by Triton kernels: a plain tensor on a GPU."""
    return type(tensor) is Tensor and masks.on_gpu(tensor)


def assignment_search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
    """Take a random slot out of up to 64 random groups and refill them all at once, optimally, again and again.

    Begins at the better of ``order`` and the identity and ends after ``moves`` slots, or earlier when as many rounds as
    there are groups bring nothing. Never worse than either start; deterministic for a seed. Shapes as in `OrderSearch`;
    it runs on the CPU, the result is on the importance's device.
    """
    device, order = importance.device, order.cpu()
    values = _real(importance.cpu())
    best, columns = _better(values, order, n, m), _scaled(values)
    groups = len(order) // m
    if groups < 2 or columns is None or moves < 1:
        return best.to(device)
    engine = Neighbourhood(columns.contiguous().numpy(), best.numpy(), Pattern(n, m), seed % 2**64, at_once=_AT_ONCE)
    count, idle = min(_AT_ONCE, groups), 0
    for _ in range(-(-moves // count)):
        before = engine.gained
        engine.step(1.0, 1)
        idle = 0 if engine.gained > before else idle + 1
        if idle > groups:
            break
    # gains are sums in another order than the total: where rounding fooled them, the start is still at hand
    return _best(values, (best, torch.from_numpy(engine.best)), n, m).to(device)


def exchange_search(importance: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
    """As `assignment_search`, on the importance's own device: up to 128 slots a round, dealt out anew by exchanges.

    It comes about as far with the same ``moves``, though not as far in every case, since exchanges of two and three slots are
    not all that an assignment can do. On a GPU it is a few launches for which the host does not wait, without triton some
    sixty a round. Shapes as in `OrderSearch`.
    """
    order = order.to(importance.device)
    if _has_kernels(importance.detach()):
        return searched([_real_problem(Problem(importance, order, n, m, seed))], moves=moves)[0]
    values = _real(importance)
    best, columns = _better(values, order, n, m), _scaled(values)
    if len(order) // m < 2 or columns is None or moves < 1:
        return best
    return _best(values, (best, exchanged(columns, best, n, m, moves=moves, seed=seed)), n, m)


def _real_problem(problem: Problem) -> Problem:
    return replace(problem, importance=_real(problem.importance), order=problem.order.to(problem.importance.device))


def _real(importance: Tensor) -> Tensor:
    values = importance.detach()
    return values if values.dtype == torch.float64 else values.float()


def _better(values: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    return _best(values, (order, torch.arange(len(order), device=order.device)), n, m)


def _best(values: Tensor, orders: tuple[Tensor, ...], n: int, m: int) -> Tensor:
    return max(orders, key=lambda each: float(kept_importance(values, each, n, m)))


def _scaled(values: Tensor) -> Tensor | None:
    """In float32, 1 on average; None where nothing can be searched: no numbers, or no more than zeros."""
    mean = float(values.double().mean()) if values.numel() else 0.0
    return (values / mean).float() if 0.0 < mean < float("inf") else None


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
