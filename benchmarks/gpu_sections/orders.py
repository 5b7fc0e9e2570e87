"""How long Bi-Mask's search takes that falls due every hundred steps: all weights of a network, and one large weight."""

from __future__ import annotations

import time
from statistics import median

import torch
from harness import table

from gpu_sections.timing import Found
from nm_compiler.solvers.backward_order import kept_importance, quick_search, search_all
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.order_launch import Problem

MOVES = 10_000
RESNET32 = [(32, 288)] * 10 + [(64, 288)] + [(64, 576)] * 9 + [(128, 576)] + [(128, 1152)] * 9  # twice as wide


def resnet50() -> list[tuple[int, int]]:
    """``[out, in * taps]`` of the 52 convolutions behind the stem."""
    shapes = []
    for width, blocks, first in ((64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024)):
        for block in range(blocks):
            given = 4 * width if block else first
            shapes += [(width, given), (width, 9 * width), (4 * width, width)] + [(4 * width, given)] * (not block)
    return shapes


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Milliseconds of a whole search, how long of it the host is busy, and what it gains."""
    cases = {"ResNet-32": (RESNET32, "2:4"), "ResNet-32 at 1:16": (RESNET32, "1:16"), "ResNet-50": (resnet50(), "2:4"),
             "14336x4096": ([(4096, 14336)], "2:4")}  # fmt: skip
    if dry:
        cases = {"tiny": ([(16, 32), (32, 16)], "2:4")}
    rows, found["orders"] = [], []
    for name, (shapes, text) in cases.items():
        n, m = (int(part) for part in text.split(":"))
        problems = [_problem(*shape, n, m, seed, device) for seed, shape in enumerate(shapes)]
        spent = [_once(problems, device) for _ in range(2 if dry else 4)][1:]  # the first compiles
        orders = search_all(quick_search, problems, moves=MOVES)
        for order in orders:
            assert torch.equal(order.sort().values, torch.arange(len(order), device=order.device)), "not a permutation"
        before, after = (sum(_kept(each, order) for each, order in zip(problems, some, strict=True))
                         for some in ([each.order for each in problems], orders))  # fmt: skip
        whole, host = (1000 * median(each[part] for each in spent) for part in (0, 1))
        rows.append([name, str(len(problems)), f"{whole:.1f}", f"{host:.1f}", f"{after / before:.4f}"])
        found["orders"].append({"case": name, "pattern": text, "weights": len(problems), "ms": whole, "host_ms": host,
                                "gain": after / before})  # fmt: skip
    print(table([f"search, {MOVES} moves a weight", "weights", "ms", "of it host", "kept, x start"], rows), flush=True)


def _problem(rows: int, columns: int, n: int, m: int, seed: int, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(rows, columns - columns % m, generator=generator, device=device)
    return Problem(weight.abs() * magnitude_mask(weight, n, m, 1), torch.arange(rows, device=device), n, m, seed)


def _kept(problem: Problem, order: torch.Tensor) -> float:
    return float(kept_importance(problem.importance, order, problem.n, problem.m))


def _once(problems: list[Problem], device: torch.device) -> tuple[float, float]:
    """Seconds until the result is there, and until the host is free."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    begin = time.perf_counter()
    search_all(quick_search, problems, moves=MOVES)
    free = time.perf_counter() - begin
    wait()
    return time.perf_counter() - begin, free
