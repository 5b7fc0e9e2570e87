"""Load the kernels, choose an instruction set, run a job on torch's threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.memory import keep_freed
from nm_compiler.runtime.native import sweep as sweeps
from nm_compiler.runtime.native.job import BYTES, Job, packed

VERSION = 6
"""Of the library's interface; `library.c` has the same number."""
INSTRUCTION_SETS = {"portable": 0, "avx2": 1, "avx512": 2}
_BAD_CODE, _SCRATCH = 1, 2
_WORTH_A_THREAD = 1 << 19  # numbers that are swept over


@dataclass(frozen=True, eq=False)
class Library:
    """The kernels for one instruction set.

    isa: its name; halves: whether jobs may be of bfloat16 data; workers: scratch and threads of the calling thread.
    """

    isa: str
    halves: bool
    _number: int
    _handle: Any
    _workers: threading.local = field(default_factory=threading.local)
    _process: int = field(default_factory=os.getpid)

    def run(self, job: Job) -> None:
        """Run a job whose operands were checked. Raises NMError, the result unfinished, for codes beyond their group."""
        threads = self._threads()
        parallel = _parallel() if threads > 1 else None
        scratch: tuple[Tensor, int, int] = self._workers.__dict__.get("scratch") or self._grown(64)
        found = self._handle.nm_run(self._number, packed(job, threads, scratch[1:]), parallel)
        if found == _SCRATCH:
            need = self._handle.nm_scratch_bytes(self._number, packed(job, threads, scratch[1:]))
            scratch = self._grown(need)
            found = self._handle.nm_run(self._number, packed(job, threads, scratch[1:]), parallel)
        if found == _BAD_CODE:
            raise NMError("a packed weight names a position beyond its group: its buffers were changed. Lower the model again")

    def sweep(self, sweep: sweeps.Sweep, numel: int) -> None:
        """Work on weights of ``numel`` numbers whose operands were checked."""
        threads = min(self._threads(), numel // _WORTH_A_THREAD + 1)
        self._handle.nm_run_sweep(self._number, sweeps.packed(sweep, threads), _parallel() if threads > 1 else None)

    def multiply_adds(self, rounds: int) -> int:
        """Compute in registers; how many floating-point operations that was. For benchmarks: the peak of one thread."""
        return int(self._handle.nm_multiply_adds(self._number, rounds))

    def read_all(self, data: Tensor) -> None:
        """Read a float32 tensor once, on one thread. For benchmarks: the memory's speed."""
        self._handle.nm_read_all(self._number, data.data_ptr(), data.numel())

    def _grown(self, need: int) -> tuple[Tensor, int, int]:
        """Scratch of the calling thread: what keeps it, where it starts, and its size. Results are to find kept pages, too."""
        keep_freed()
        kept = torch.empty(need + 64, dtype=torch.uint8)
        start = kept.data_ptr()
        found = self._workers.scratch = kept, start + -start % 64, need
        return found

    def _threads(self) -> int:
        """One after a fork: OpenMP's threads did not come along."""
        return torch.get_num_threads() if os.getpid() == self._process else 1


@cache
def load(isa: str | None = None) -> Library | str:
    """The kernels for ``isa``, by default ``NM_COMPILER_ISA`` or the best that the processor has; or why there are none."""
    isa = isa or os.environ.get("NM_COMPILER_ISA")
    if os.environ.get("NM_COMPILER_NATIVE") == "0":
        return "switched off by NM_COMPILER_NATIVE=0"
    path = Path(__file__).with_name("_kernels.so")
    if not path.exists():
        log = path.with_suffix(".log")
        why = f"the compiler's words are in {log}" if log.exists() else "pip install nm_compiler, with a C compiler at hand"
        return f"the CPU kernels were not built: {why}"
    try:
        handle = ctypes.CDLL(str(path))
        fits = handle.nm_version() == VERSION and (handle.nm_job_bytes(), handle.nm_sweep_bytes()) == (BYTES, sweeps.BYTES)
        if not fits:
            return "the CPU kernels were built from another version: reinstall nm_compiler"
        _declare(handle)
    except (OSError, AttributeError) as error:
        return f"the CPU kernels cannot be loaded ({error}): reinstall nm_compiler"
    return _chosen(handle, isa)


@cache
def digest() -> str:
    """Of the library's file: what was measured with other kernels says nothing about these."""
    return hashlib.blake2b(Path(__file__).with_name("_kernels.so").read_bytes(), digest_size=6).hexdigest()


def _declare(handle: Any) -> None:
    """What the functions take. Raises AttributeError for one that is not there."""
    handle.nm_scratch_bytes.argtypes = [ctypes.c_int64, ctypes.c_char_p]
    handle.nm_scratch_bytes.restype = ctypes.c_int64
    handle.nm_run.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p]
    handle.nm_run_sweep.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p]
    handle.nm_run_sweep.restype = None
    handle.nm_multiply_adds.argtypes, handle.nm_multiply_adds.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64
    handle.nm_read_all.argtypes, handle.nm_read_all.restype = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64], None
    handle.nm_halves.argtypes, handle.nm_halves.restype = [ctypes.c_int64], ctypes.c_int64
    handle.nm_isa_name.argtypes, handle.nm_isa_name.restype = [ctypes.c_int64], ctypes.c_char_p


def _chosen(handle: Any, isa: str | None) -> Library | str:
    if isa is not None and isa not in INSTRUCTION_SETS:
        raise NMError(f"isa={isa!r}: choose one of {', '.join(INSTRUCTION_SETS)}")
    for name in (isa,) if isa is not None else ("avx512", "avx2", "portable"):
        number = INSTRUCTION_SETS[name]
        if handle.nm_isa_name(number) is None:
            continue
        if isa is None and name == "portable" and platform.machine().lower() in ("x86_64", "amd64"):
            return "the processor has no AVX2: dense kernels are faster there"
        return Library(name, bool(handle.nm_halves(number)), number, handle)
    return f"the processor has no {isa}"


@cache
def _found_parallel() -> int:
    """The address of GOMP_parallel in torch's own OpenMP: one pool of threads for both."""
    address = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    assert address is not None
    return address


def _parallel() -> int | None:
    """None, and not remembered, where torch's OpenMP has it not: then one thread works."""
    try:
        return _found_parallel()
    except (AttributeError, OSError):
        return None
