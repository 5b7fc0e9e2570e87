# mypy: disable-error-code="no-untyped-call"
"""Backward orders searched by Triton kernels in the interpreter and by torch operations: prints as JSON which agree.

Sums are taken in another order by the kernels, which only exchanges that gain about the same could show: random numbers, and
whole ones where nothing is rounded, have the same orders searched to the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain
from unittest import mock

import torch
from torch import Tensor

from nm_compiler.solvers import device_order, masks, order_launch
from nm_compiler.solvers.backward_order import exchange_search, kept_importance, search_all
from nm_compiler.solvers.order_launch import Problem

Case = tuple[str, bool]


def problem(
    n: int, m: int, groups: int, columns: int, dtype: torch.dtype = torch.float32, fill: float | None = None
) -> Problem:
    draw = torch.Generator().manual_seed(groups)
    importance = torch.rand(groups * m, columns, generator=draw, dtype=torch.float64).to(dtype)
    if fill is not None:
        importance = torch.full_like(importance, fill)
    return Problem(importance, torch.randperm(groups * m, generator=draw), n, m, 5)


def by_kernels(problems: list[Problem], moves: int) -> list[Tensor]:
    with mock.patch.object(masks, "on_gpu", return_value=True):
        return search_all(exchange_search, problems, moves=moves)


def alone(given: Problem, moves: int) -> Tensor:
    return exchange_search(given.importance, given.order, given.n, given.m, moves=moves, seed=given.seed)


def agree(name: str, problems: list[Problem], moves: int) -> Iterator[Case]:
    for at, (given, found) in enumerate(zip(problems, by_kernels(problems, moves), strict=True)):
        same = found.dtype == torch.int64 and torch.equal(found, alone(given, moves))
        yield f"orders {name} {at} of {given.n}:{given.m}, {given.groups} groups", same


def orders() -> Iterator[Case]:
    several = [problem(2, 4, 8, 40), problem(2, 4, 2, 150), problem(2, 4, 18, 30, torch.bfloat16), problem(1, 16, 4, 20)]
    yield from agree("in few launches", several, 30)
    with mock.patch.object(device_order, "AT_ONCE", 16), mock.patch.object(order_launch, "AT_ONCE", 16):
        yield from agree("of more groups than a round takes", [problem(2, 4, 35, 5)], 5 * 16)
    for n, m in ((3, 4), (2, 3), (3, 7), (5, 8)):
        yield from agree("of other patterns", [problem(n, m, 7, 20, torch.float64)], 21)
    yield from agree("to the end", [problem(2, 4, 2, 5)], 80)
    with mock.patch.object(order_launch, "_LONG", 0):
        yield from agree("a round at a time", [problem(2, 4, 9, 300), problem(1, 4, 40, 70)], 36)
        yield from agree("a round at a time to the end", [problem(1, 2, 2, 5)], 70)
    odd = [problem(2, 4, 4, 6, fill=fill) for fill in (0.0, torch.inf, torch.nan)]
    yield from agree("without numbers", [*odd, problem(2, 4, 1, 6), problem(2, 4, 4, 0)], 8)
    yield from agree("without moves", [problem(2, 4, 4, 6)], 0)


def sums() -> Iterator[Case]:
    for n, m, columns, dtype in ((2, 4, 1100, torch.float32), (3, 7, 50, torch.float64), (1, 16, 33, torch.float32)):
        given = problem(n, m, 3, columns, dtype)
        importance = given.importance.where(given.importance < 0.7, 0.7)  # equal ones
        both = torch.stack([given.order, torch.arange(len(given.order))])
        found = order_launch.kept(importance, both, n, m)
        wanted = torch.stack([kept_importance(importance, order, n, m) for order in both])
        yield f"kept {n}:{m} {dtype}", bool(((found - wanted).abs() <= 1e-12 * wanted).all())


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(dict(chain(orders(), sums()))))
