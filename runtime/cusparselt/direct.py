"""Products through the library itself, on plans that are kept: a call costs a look-up, two allocations and a launch.

torch's own call makes and destroys descriptors, selection and plan every time, on an H200 0.4 to 1.0 ms of the host. Memory
comes from torch's allocator and the stream is torch's current one, so a CUDA graph can be captured.

Off unless the environment says ``NM_COMPILER_CUSPARSELT=direct``: it has not run on a GPU yet, and a mistake in how a C
function is called could end the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nm_compiler.runtime.cusparselt.library import Library, found
from nm_compiler.runtime.cusparselt.plan import CONFIGS, Problem
from nm_compiler.runtime.cusparselt.plans import MOST, Plans


class Direct:
    """library: to call; most: plans that a thread keeps; stream: the current one of a device, as a number."""

    def __init__(self, library: Library, *, most: int = MOST, stream: Callable[[int], int] | None = None) -> None:
        self._library, self._most = library, most
        self._stream = stream or _current_stream()
        self._threads = threading.local()

    @property
    def plans(self) -> Plans:
        """The plans of this thread: handles of the library are not shared."""
        try:
            mine: Plans = self._threads.plans
        except AttributeError:
            mine = self._threads.plans = Plans(self._library, self._most)
        return mine

    def product(
        self, packed: Tensor, dense: Tensor, bias: Tensor | None, out: int, *, rows: bool, algorithm: int = 0,
        activation: str = "", alpha: Tensor | None = None, result: torch.dtype | None = None,
    ) -> Tensor | None:  # fmt: skip
        """``act(alpha W x^T + bias)``: ``[tokens, out]``, contiguous, with ``rows``, else ``[out, tokens]``; None if refused.

        packed: of torch's library; dense: ``[in, tokens]``, it or its transpose contiguous; bias: ``[out]``, contiguous; all
        at addresses that the library takes. alpha: float32 ``[out]``, contiguous. result: dtype of y, if not that of x.
        Raises NMError if a launch fails.
        """
        device = dense.get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.product(
                    packed, dense, bias, out, rows=rows, algorithm=algorithm, activation=activation, alpha=alpha, result=result
                )
        problem = self.problem(dense, bias, out, rows, algorithm, activation, result, alpha is not None)
        plan = self.plans.find(problem)
        if plan is None:
            return None
        y = dense.new_empty((problem.tokens, out) if rows else (out, problem.tokens), dtype=problem.result)
        scratch = dense.new_empty(plan.workspace, dtype=torch.uint8) if plan.workspace else None
        plan.launch(
            packed.data_ptr(), dense.data_ptr(), y.data_ptr(), 0 if scratch is None else scratch.data_ptr(),
            self._stream(problem.device), 0 if alpha is None else alpha.data_ptr(),
        )  # fmt: skip
        return y

    def problem(
        self, dense: Tensor, bias: Tensor | None, out: int, rows: bool, algorithm: int = 0, activation: str = "",
        result: torch.dtype | None = None, scaled: bool = False,
    ) -> Problem:  # fmt: skip
        """What `product` makes its plan for; the arguments are the same."""
        inputs, tokens = dense.shape
        at = 0 if bias is None else bias.data_ptr()
        return Problem(
            dense.get_device(), dense.dtype, result or dense.dtype, out, inputs, tokens, dense.is_contiguous(), rows,
            algorithm, activation, at, scaled,
        )  # fmt: skip

    def configurations(self, problem: Problem) -> int:
        """How many the library has for a problem on the current device; 0 if it refuses it."""
        plan = self.plans.find(problem)
        return 0 if plan is None else plan.read(CONFIGS)


def binding(device: torch.device) -> Direct | None:
    """What multiplies on a device without torch's call; None on a CPU, where not asked for, or the library is not known."""
    asked = device.type == "cuda" and os.environ.get("NM_COMPILER_CUSPARSELT") == "direct"
    return _direct() if asked else None


@cache
def _direct() -> Direct | None:
    library = found()
    return None if library is None else Direct(library)


def _current_stream() -> Callable[[int], int]:
    raw: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda device: torch.cuda.current_stream(device).cuda_stream)
