"""The machine's own limits, on one thread: multiply-adds in registers and reading from memory."""

from __future__ import annotations

import time

import torch

from nm_compiler.runtime.native.library import Library
from nm_compiler.runtime.native.pages import granted, mapping, tensor_in


def limits(library: Library) -> dict[str, float]:
    """GFLOP/s, and GB/s from pages as torch gets them and from huge ones, the best of a few tries: these are limits."""
    rounds, data = 5_000_000, torch.ones(48_000_000)
    huge = tensor_in(*mapping(data.nbytes), data).copy_(data) if granted() else data
    flops, reads, huge_reads = list[float](), list[float](), list[float]()
    for _ in range(5):
        begin = time.perf_counter()
        done = library.multiply_adds(rounds)
        flops.append(done / (time.perf_counter() - begin))
        for each, found in ((data, reads), (huge, huge_reads)):
            begin = time.perf_counter()
            library.read_all(each)
            found.append(data.nbytes / (time.perf_counter() - begin))
    return {"gflops": max(flops) / 1e9, "gbytes": max(reads) / 1e9, "gbytes in huge pages": max(huge_reads) / 1e9}
