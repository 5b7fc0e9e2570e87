"""Backward orders of many weights searched on a GPU at once, for `nm_compiler.solvers.backward_order`.

The host queues launches and never waits for their results: what decides between two orders is computed on the device, and
the draws of all weights are copied there together. Every kind of launch gets a stream of its own, all of which the caller's
stream waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nm_compiler.solvers.device_order import AT_ONCE, DEALS, PATIENCE, ROUNDING, drawn

_LONG = 1 << 24  # distances of a round in one column, times columns: with more of them a round is spread over programs
_SPREAD = 128  # programs that share such a round
_WIDTH = 64  # columns of a tile: with its slots and rows, what the registers of a program hold
_HIGH, _WIDE = 16, 32  # slots and rows of a tile, at most
_COMPARED = 8192  # pairs of entries that a program compares at once
_ALIGNED = 32  # numbers
_WARPS: dict[str, Any] = {"num_warps": 16, "num_stages": 1}


@dataclass(frozen=True, slots=True)
class Problem:
    """An order to search. importance: ``[rows, columns]``, not negative; order: int64 ``[rows]``; draws follow the seed."""

    importance: Tensor
    order: Tensor
    n: int
    m: int
    seed: int

    @property
    def groups(self) -> int:
        return len(self.order) // self.m

    @property
    def block(self) -> int:
        """Slots of a round, up to a power of two."""
        return max(16, 1 << (min(AT_ONCE, self.groups) - 1).bit_length())

    @property
    def is_long(self) -> bool:
        return self.block**2 * self.importance.shape[1] > _LONG


def searched(problems: Sequence[Problem], *, moves: int) -> list[Tensor]:
    """For every problem an order, int64, at least as good as the one given and as the identity.

    importance: float32 or float64 ``[rows, columns]``, all on one GPU. Where it is not finite or all zeros one of both
    starts comes back. moves: slots that are dealt out in each.
    """
    found = []
    with _on(problems):
        for each in problems:
            identity = torch.arange(len(each.order), device=each.order.device)
            found.append(_better(each, each.order, identity))
        open_ = [at for at, each in enumerate(problems) if each.groups > 1 and each.importance.numel() and moves > 0]
        ends = _exchanged([problems[at] for at in open_], [found[at] for at in open_], moves)
        for at, end in zip(open_, ends, strict=True):  # gains are sums in another order than the total
            found[at] = _better(problems[at], found[at], _sound(end, found[at]))
    return found


def _sound(order: Tensor, otherwise: Tensor) -> Tensor:
    """The order if every row is in it once, which is checked because kernels wrote it that share memory; else the other."""
    rows = torch.arange(len(order), device=order.device)
    return torch.where((order.sort().values == rows).all(), order, otherwise)


def _better(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    """The order that keeps more, the first if neither does."""
    if not problem.importance.numel():
        return first
    totals = kept(problem.importance, torch.stack([first, second]), problem.n, problem.m)
    return torch.where(totals[1] > totals[0], second, first)


def kept(importance: Tensor, orders: Tensor, n: int, m: int) -> Tensor:
    """`backward_order.kept_importance` of some orders, float64 ``[orders]``. orders: int64 ``[orders, rows]``."""
    values, (rows, columns) = importance.contiguous(), importance.shape
    tall = 1 << (m - 1).bit_length()
    width = min(1 << (columns - 1).bit_length(), max(1, _COMPARED // tall**2))
    grid = (rows // m, -(-columns // width), len(orders))
    sums = torch.empty(grid[::-1], dtype=torch.float64, device=values.device)
    _kernels().kept[grid](values, orders.contiguous(), sums, rows, columns, n=n, m=m, tall=tall, width=width)
    return sums.sum((1, 2))


def _exchanged(problems: Sequence[Problem], starts: Sequence[Tensor], moves: int) -> list[Tensor]:
    """As `device_order.exchanged` for every problem, each importance scaled to a mean of 1."""
    results: dict[int, Tensor] = {}
    launches, kinds = [], dict[Any, list[int]]()
    for at, each in enumerate(problems):
        kinds.setdefault(at if each.is_long else (each.n, each.m, each.block), []).append(at)
    for some in kinds.values():
        prepare = _long if problems[some[0]].is_long else _together
        launch, members = prepare([problems[at] for at in some], [starts[at] for at in some], moves)
        launches.append(launch)
        results.update(zip(some, members, strict=True))
    _side_by_side(launches, problems)
    return [results[at].long() for at in range(len(problems))]


Prepared = tuple[Callable[[], None], Sequence[Tensor]]


def _together(problems: Sequence[Problem], starts: Sequence[Tensor], moves: int) -> Prepared:
    """One launch for problems with the same pattern and block, and where it leaves the orders."""
    first, device = problems[0], starts[0].device
    values, begins = _side_by_side_in_memory(problems)
    draws = [drawn(each.groups, each.m, moves, each.seed).int() for each in problems]
    rows, numbers = [len(start) for start in starts], [draw.numel() for draw in draws]
    members, places = torch.cat(list(starts)).int(), _sent(torch.cat([draw.flatten() for draw in draws]), device)
    parts = zip(
        begins, accumulate(rows, initial=0), accumulate(numbers, initial=0), problems, draws, strict=False
    )  # fmt: skip
    table = [
        (begin, row, number, each.groups + PATIENCE, draw.shape[1], len(draw), each.importance.shape[1])
        for begin, row, number, each, draw in parts
    ]
    worth, dealt = _scratch(len(problems), first.block, device)
    launch = partial(
        _kernels().all_rounds[(len(problems),)], values, members, places, _sent(torch.tensor(table), device), worth, dealt,
        n=first.n, m=first.m, **(_summing(first.block) | _dealing(first.block) | _WARPS),
    )  # fmt: skip
    return launch, members.split(rows)


def _long(problems: Sequence[Problem], starts: Sequence[Tensor], moves: int) -> Prepared:
    """Two launches a round for a single problem, and where they leave the order."""
    (problem,), (start,) = problems, starts
    device, block, columns = start.device, problem.block, problem.importance.shape[1]
    values, members = torch.empty(problem.importance.shape, dtype=torch.float32, device=device), start.int()
    _scale(problem.importance, values)
    draws, patience = drawn(problem.groups, problem.m, moves, problem.seed).int(), problem.groups + PATIENCE
    places, count, shape = _sent(draws, device), draws.shape[1], _summing(block)
    tiles, width = -(-count // _HIGH) * (block // shape["wide"]), shape["width"]
    length = width * -(-columns // (width * -(-_SPREAD // tiles)))
    parts = torch.empty(-(-columns // length), block, block, dtype=torch.float32, device=device)
    (worth, dealt), idle = _scratch(1, block, device), torch.zeros(1, dtype=torch.int32, device=device)

    def launch() -> None:
        kernels = _kernels()
        for mine in places:
            kernels.part_of_round[(tiles, len(parts))](
                values, members, mine, idle, parts, patience, columns, length, count,
                n=problem.n, m=problem.m, **shape, **_WARPS,
            )  # fmt: skip
            kernels.end_of_round[(1,)](
                members, mine, idle, parts, worth, dealt, patience, len(parts), count, **_dealing(block), **_WARPS
            )

    return launch, [members]


def _summing(block: int) -> dict[str, int]:
    """The tile of distances that a program sums: its slots, their rows, and columns."""
    return {"high": _HIGH, "block": block, "wide": min(block, _WIDE), "width": _WIDTH}


def _dealing(block: int) -> dict[str, Any]:
    return {
        "high": _HIGH,
        "block": block,
        "wide": min(block, _WIDE),
        "way": min(block, 64),
        "deals": DEALS,
        "rounding": ROUNDING,
    }


def _scratch(programs: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    worth = torch.empty(programs, 4, block, block, dtype=torch.float32, device=device)
    return worth, torch.empty(programs, 3, block, dtype=torch.int32, device=device)


def _side_by_side_in_memory(problems: Sequence[Problem]) -> tuple[Tensor, list[int]]:
    """All importances scaled, one after the other, and where each begins."""
    sizes = [each.importance.numel() for each in problems]
    ends = list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))
    values = torch.empty(ends[-1], dtype=torch.float32, device=problems[0].importance.device)
    for each, size, begin in zip(problems, sizes, ends, strict=False):
        _scale(each.importance, values[begin : begin + size].view(each.importance.shape))
    return values, ends[:-1]


def _scale(importance: Tensor, out: Tensor) -> None:
    """Write it in float32, 1 on average; zeros, among which no exchange gains, where that cannot be."""
    mean = importance.mean(dtype=torch.float64)
    out.copy_(torch.where((mean > 0) & (mean < torch.inf), importance / mean, 0.0))


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    return numbers.to(device, non_blocking=True)


@contextmanager
def _on(problems: Sequence[Problem]) -> Iterator[None]:
    """Launches go to the device of the tensors."""
    if problems and problems[0].importance.is_cuda:
        with torch.cuda.device_of(problems[0].importance):
            yield
    else:
        yield


def _side_by_side(launches: Sequence[Callable[[], None]], problems: Sequence[Problem]) -> None:
    """On streams of their own, after what is queued on the current one and before what will be."""
    if len(launches) < 2 or not problems[0].importance.is_cuda:
        for launch in launches:
            launch()
        return
    current = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in launches]
    for stream, launch in zip(streams, launches, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            launch()
    for stream in streams:
        current.wait_stream(stream)


def _kernels() -> Any:
    import nm_compiler.solvers.order_triton as kernels

    return kernels
