"""Compile a kernel with numba, cached on disk where that is possible.

Import this module, and the kernels that use it, inside the function that needs them: numba takes half a second to import.
Kernels copy arrays in loops: `a[:] = b` compiles numba's words for shapes that do not fit as well, which takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

try:
    import numba
except AttributeError as error:  # numba extends whatever module of the name `coverage` it finds
    raise ImportError("numba cannot be imported: a file coverage.py on sys.path hides the package of that name") from error

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger(__name__)


_LOOSE = frozenset({"reassoc", "contract", "nsz", "arcp"})  # sums in any order; infinities keep their meaning


def jit_finite(kernel: F) -> F:
    """`jit` for what never sees a NaN: minima become vectors."""
    return jit(kernel, _LOOSE | {"nnan"})


def jit(kernel: F, loose: frozenset[str] = _LOOSE) -> F:
    """``kernel`` as machine code: no GIL while it runs, sums in any order, no division checks.

    The code is kept beside the source or in the user's cache (NUMBA_CACHE_DIR moves it). Where neither can be written the
    kernel is compiled afresh in every process, a few seconds, and the log says so once for each.
    """
    try:
        compiled = _compiled(kernel, loose, cache=True)
    except RuntimeError as error:  # numba found no directory that it may write to
        _log.info("%s is compiled in every process, set NUMBA_CACHE_DIR to a writable directory: %s", kernel.__name__, error)
        compiled = _compiled(kernel, loose, cache=False)
    return compiled


def _compiled(kernel: F, loose: frozenset[str], *, cache: bool) -> F:
    return cast(F, numba.njit(cache=cache, nogil=True, fastmath=set(loose), error_model="numpy")(kernel))
