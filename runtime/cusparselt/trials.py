"""Time the library's configurations for one product, none before its numbers were compared.

The library's own search is not used: torch's call of it was seen to end in "illegal instruction" for a small product, and it
compares no numbers. Here every configuration that has a plan runs once and is compared, then is timed; the fastest few and the
default are timed again, in turn. Slices of the reduction axis are tried only if asked for.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.runtime.choose import MARGIN
from nm_compiler.runtime.cusparselt.algorithm import Algorithm
from nm_compiler.runtime.cusparselt.direct import Direct

FINALISTS, ROUNDS, CALLS = 3, 5, 3
Run = Callable[[int], Tensor | None]


def fastest(
    direct: Direct, packed: Tensor, dense: Tensor, bias: Tensor | None, right: Callable[[Tensor], bool], out: int, *,
    rows: bool, activation: str = "", splits: Sequence[int] = (),
) -> int:  # fmt: skip
    """The algorithm, by number, that took least time on the device; 0 if none is faster than the default by more than noise.

    The operands are those of `Direct.product`; right: whether a result of it has the right numbers; splits: slices of the
    reduction axis to try as well, with the fastest configurations. The device is waited for.
    """

    def run(code: int) -> Tensor | None:
        return direct.product(packed, dense, bias, out, rows=rows, algorithm=code, activation=activation)

    known = direct.configurations(direct.problem(dense, bias, out, rows, 0, activation))
    taken = _timed(run, right, [0, *(Algorithm(config, split=int(not config)).code for config in range(known))])
    if 0 not in taken:
        return 0
    taken |= _timed(run, right, list(_sliced(_best(taken), splits)))
    codes = list(dict.fromkeys((0, *_best(taken))))
    rounds = [[_seconds(partial(run, code), dense.device) for code in codes] for _ in range(ROUNDS)]
    last = {code: statistics.median(each[at] for each in rounds) for at, code in enumerate(codes)}
    winner = min(last, key=last.__getitem__)
    return winner if last[0] > MARGIN * last[winner] else 0


def _best(taken: dict[int, float]) -> list[int]:
    return sorted(taken, key=taken.__getitem__)[:FINALISTS]


def _sliced(codes: Sequence[int], splits: Sequence[int]) -> Iterator[int]:
    for code in codes:
        for split in splits:
            yield from (Algorithm(Algorithm.of(code).config, split, mode).code for mode in (1, 2))


def _timed(run: Run, right: Callable[[Tensor], bool], codes: Sequence[int]) -> dict[int, float]:
    """Seconds of each that runs and computes what it should."""
    log, taken = logging.getLogger(__name__), dict[int, float]()
    for code in codes:
        log.debug("trying algorithm %s", Algorithm.of(code))  # the last line, should the device be lost
        try:
            y = run(code)
        except NMError as error:
            log.info("algorithm %s does not run: %s", Algorithm.of(code), error)
            continue
        if y is None:
            continue
        if not right(y):
            log.info("algorithm %s computes something else", Algorithm.of(code))
            continue
        taken[code] = _seconds(partial(run, code), y.device)
    return taken


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the device, which is waited for."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(CALLS):
            work()
        return (time.perf_counter() - begin) / CALLS
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(CALLS):
        work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / CALLS
