"""Does the cost of masks and scores grow linearly with the weights? From 1 to 300 million of them in one linear layer.

    python benchmarks/scaling.py --threads 1 --clock cpu

A step without its product: forward mask, masked weight, backward mask (Bi-Mask), gradients of weight and scores. Beside it
what falls due now and then: retiring a combination (LBC), searching an order (Bi-Mask). Nanoseconds a weight, so that a row
that stays the same from left to right is linear. bf16: weights and scores in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import CLOCKS, Clock, arguments, environment, seconds, table, write
from torch import nn

import nm_compiler as nm
from nm_compiler.evaluate import value_of
from nm_compiler.methods.lbc import LBC
from nm_compiler.rewrite import masked_nodes

LARGE = 1 << 26  # weights from which one run is long enough to be timed alone
SHAPES = ((1024, 1024), (2048, 4096), (4096, 7168), (8192, 12288), (16384, 18432))
METHODS = {"LBC": nm.LBC(), "BiMask": nm.BiMask(), "SRSTE": nm.SRSTE()}


def work(
    method: nm.Method, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], None] | None]:
    """(a step, what falls due) of one weight."""
    out, inner = shape
    layer = nn.Linear(inner, out, bias=False, dtype=dtype)
    sparse = nm.compile(layer, torch.randn(2, inner, dtype=dtype), method=method, include="*")
    weight = sparse.weights[0]
    graph = sparse.graph(True)
    masked = masked_nodes(graph, "weight")[0]
    grad = torch.randn(out, inner).to(dtype)

    def step() -> None:
        inputs = [value_of(graph, arg) if isinstance(arg, torch.fx.Node) else arg for arg in masked.args]
        forward = masked.target(*inputs)  # type: ignore[operator]
        if isinstance(method, nm.BiMask):
            pattern, site = weight.site.pattern, weight.site
            torch.ops.nm.backward_weight(forward.detach(), weight["order"], pattern.n, pattern.m, site.rows)
        forward.backward(grad)
        sparse.zero_grad()

    def due() -> None:
        if isinstance(method, LBC):
            live = weight["live"].clone()
            method._retire(weight, weight.site.pattern.combinations - 1)
            weight["live"].copy_(live)
        else:
            nm.SparsityScheduler(sparse, total_steps=10).step()

    return step, None if isinstance(method, nm.SRSTE) else due


def per_weight(run: Callable[[], object], weights: int, repeats: int, clock: Clock) -> float:
    """Nanoseconds, the median, after one run that compiles and touches the memory."""
    run()
    times = sorted(seconds(run, clock) for _ in range(repeats if weights < LARGE else 3))
    return 1e9 * times[len(times) // 2] / weights


def once(run: Callable[[], object], weights: int, repeats: int, clock: Clock) -> float:
    """The same for what takes long: a large weight is worth one run, its kernels are compiled by then."""
    return 1e9 * seconds(run, clock) / weights if weights >= LARGE else per_weight(run, weights, repeats, clock)


def main(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    parser = arguments("Cost of masks and scores by the number of weights", "scaling")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    started, clock, repeats = environment(options.threads), CLOCKS[options.clock], 2 if options.quick else 5
    shapes = SHAPES[:2] if options.quick else SHAPES
    found: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        weights = shape[0] * shape[1]
        plain = torch.randn(shape)
        found.setdefault("copy into fresh memory", {})[str(weights)] = per_weight(lambda: plain.clone(), weights, 5, clock)  # noqa: B023
        for name, method in METHODS.items():
            for dtype in (torch.float32, torch.bfloat16):
                step, due = work(method, shape, dtype)
                key = f"{name} {str(dtype).removeprefix('torch.')}"
                found.setdefault(f"{key}, a step", {})[str(weights)] = per_weight(step, weights, repeats, clock)
                if due:
                    found.setdefault(f"{key}, due", {})[str(weights)] = once(due, weights, repeats, clock)
                del step, due
    head = ["ns a weight", *(f"{rows * inner / 2**20:.0f}M" for rows, inner in shapes), "last / first"]
    rows = [
        [key, *(f"{value:.2f}" for value in values.values()), f"{list(values.values())[-1] / next(iter(values.values())):.2f}"]
        for key, values in found.items()
    ]
    print(table(head, rows))
    write(options.out, started, {"clock": options.clock, "nanoseconds_per_weight": found})


if __name__ == "__main__":
    main(sys.argv[1:])
