"""Look for a faster algorithm of the library, and trust none before its results were compared.

cuSPARSELt times its algorithms for one shape. torch gives the winner as a tuple that begins with its number, or, by an older
function, as the number alone; a split of the reduction axis that comes with it is not used. Algorithms with wrong results,
not at every call, have been reported (pytorch issue 155333), so a winner that once differs from the dense product is dropped.

Nothing smaller than `LEAST` is searched. On an H200 (torch 2.11, cuSPARSELt 0.8.0) the search for a weight [256, 64] and 45
tokens in float16, result in rows, ended in "illegal instruction": the CUDA context was lost, and with it the process. Such
small products are not packed for speed anyway.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.runtime.cusparselt.op import operand

LEAST = 256
"""Of both sizes of the weight and of the tokens."""
ROUNDINGS = 4  # how many roundings of the dtype two right results may differ by


def search(weight: Tensor, packed: Tensor, x: Tensor, bias: Tensor | None, *, rows: bool, checks: int = 5) -> int:
    """The algorithm that the library finds fastest for ``x W^T + b``; 0, its first choice, if that one cannot be trusted.

    weight: dense ``[out, in]`` with its zeros; packed: of `pack`; x: ``[tokens, in]``, of the size that counts.
    rows: as in ``nm::cslt_linear``. 0 as well if any of these sizes is below `LEAST`. The winner has to agree with the dense
    product ``checks`` times. The device is waited for.
    """
    if min(*weight.shape, x.shape[0]) < LEAST:
        return 0
    winner = _asked(packed, operand(x), bias, rows)
    if winner <= 0:
        return 0
    wanted = functional.linear(x, weight, bias)
    for _ in range(checks):
        found = torch.ops.nm.cslt_linear(x, packed, bias, *weight.shape, winner, rows)
        if not agrees(found, wanted):
            logging.getLogger(__name__).warning(
                "algorithm %d of cuSPARSELt computes something else for %s and %d tokens: the default one is used",
                winner, list(weight.shape), x.shape[0],
            )  # fmt: skip
            return 0
    return winner


def agrees(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results of one dtype are the same but for rounding: of each value, or of a usual one where terms cancel."""
    tolerance = ROUNDINGS * torch.finfo(wanted.dtype).eps
    usual = float(wanted.float().square().mean().sqrt()) if wanted.numel() else 0.0
    return torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance * usual)


def _asked(packed: Tensor, dense: Tensor, bias: Tensor | None, rows: bool) -> int:
    current: Any = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    ask: Any = current or getattr(torch, "_cslt_sparse_mm_search", None)
    if ask is None:
        return 0
    try:
        answer = ask(packed, dense, bias, None, None, rows)
    except RuntimeError as error:  # no search for this shape in this version: the default algorithm needs none
        logging.getLogger(__name__).info("cuSPARSELt cannot search for %s: %s", list(dense.shape), error)
        return 0
    return int(answer[0] if isinstance(answer, tuple) else answer)
