"""Never slower than dense: measure a product both ways on the user's device, once per distinct shape, and remember it.

    key        device, op, shapes, dtype, pattern, versions of torch and of this package
    cache      one JSON file, NM_COMPILER_CACHE or the user's cache folder; written whole or not at all
    verdict    sparse only where its median is faster by more than noise

Timing: both run in turn in the same rounds, so that a busy moment falls on both.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

MARGIN = 1.02
"""Sparse is chosen if dense takes this much longer: less is noise."""
_ROUNDS, _LEAST_S = 9, 2e-3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call, medians."""

    dense_s: float
    sparse_s: float

    @property
    def speedup(self) -> float:
        """How many times faster sparse is."""
        return self.dense_s / self.sparse_s

    @property
    def sparse_wins(self) -> bool:
        """Whether sparse is faster by more than noise."""
        return self.speedup > MARGIN


class Choices:
    """Timings by key, kept on disk. A file that cannot be read or written is only a slower start, never an error."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = default_path() if path is None else Path(path)
        self._known: dict[str, dict[str, float]] | None = None

    def find(self, key: str, measure: Callable[[], Timing]) -> Timing:
        """What is known under ``key``; measured and kept if nothing is."""
        if self._known is None:
            self._known = _read(self.path)
        if key not in self._known:
            self._known[key] = asdict(measure())
            _write(self.path, {**_read(self.path), **self._known})
        return Timing(**self._known[key])


def key_of(device: torch.device, **facts: Any) -> str:
    """One line that names a measurement: the machine, the versions, and ``facts``."""
    from nm_compiler import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} {torch.get_num_threads()} threads"
    parts = {"device": name, "torch": torch.__version__, "nm": __version__, **facts}
    return "; ".join(f"{key}={value}" for key, value in parts.items())


def replayed(work: Callable[[], object]) -> Callable[[], object]:
    """The same kernels as a CUDA graph, after a few calls that settle libraries and allocators."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def side_by_side(
    dense: Callable[[], object], sparse: Callable[[], object], device: torch.device, rounds: int = _ROUNDS
) -> Timing:
    """Time both, in turn, as often as a call needs to be longer than the clock's noise."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    for work in (dense, sparse, dense, sparse):
        work()
    wait()
    calls = max(1, round(_LEAST_S / max(_once(dense, 1, wait), 1e-6)))
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            taken[which].append(_once((dense, sparse)[which], calls, wait))
    return Timing(statistics.median(taken[0]), statistics.median(taken[1]))


def default_path() -> Path:
    """``NM_COMPILER_CACHE`` if set, else ``nm_compiler/choices.json`` in the user's cache folder."""
    given = os.environ.get("NM_COMPILER_CACHE")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nm_compiler"
    return base / "choices.json"


def _once(work: Callable[[], object], calls: int, wait: Callable[[], None]) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    wait()
    return (time.perf_counter() - begin) / calls


@cache
def _processor() -> str:
    """Its name, where Linux says it, and what torch finds it able to do."""
    lines = [platform.machine()]
    with contextlib.suppress(OSError):
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        lines += [line.partition(":")[2].strip() for line in named[:1]]
    return " ".join([*lines, torch.backends.cpu.get_cpu_capability()])


def _nothing() -> None:
    """A CPU has done its work when the call returns."""


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, dict) and set(value) == {"dense_s", "sparse_s"}}


def _write(path: Path, known: dict[str, dict[str, float]]) -> None:
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        half.replace(path)
