"""Look for a faster algorithm of the library, and trust none before its results were compared.

Where the library is called directly, its configurations are timed here (`nm_compiler.runtime.cusparselt.trials`). Otherwise
torch is asked for cuSPARSELt's own search: a tuple that begins with the winner's number, or, by an older function, the number
alone; a split of the reduction axis that comes with it is not used. Algorithms with wrong results, not at every call, have
been reported (pytorch issue 155333), so a winner that once differs from the dense product is dropped.

Nothing smaller than `LEAST` is searched. On an H200 (torch 2.11, cuSPARSELt 0.8.0) the search for a weight [256, 64] and 45
tokens in float16, result in rows, ended in "illegal instruction": the CUDA context was lost, and with it the process. Such
small products are not packed for speed anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.runtime.cusparselt.direct import binding
from nm_compiler.runtime.cusparselt.op import aligned, multiply, operand
from nm_compiler.runtime.cusparselt.trials import fastest

LEAST = 256
"""Of both sizes of the weight and of the tokens."""
SEEN = 1024
"""Sizes of a weight from which on searches have run on an H200; unasked, smaller ones are not searched."""
ROUNDINGS = 4  # how many roundings of the dtype two right results may differ by


def search(
    weight: Tensor, packed: Tensor, x: Tensor, bias: Tensor | None, *, rows: bool, activation: str = "", checks: int = 5,
    splits: Sequence[int] = (), least: int = LEAST,
) -> int:  # fmt: skip
    """The algorithm that is found fastest for ``act(x W^T + b)``; 0, the library's choice, if that one cannot be trusted.

    weight: dense ``[out, in]`` with its zeros; packed: of `pack`; x: ``[tokens, in]``, of the size that counts.
    rows, activation: as in ``nm::cslt_linear``. 0 as well if there are fewer tokens than `LEAST`, or a size of the weight is
    below ``least``, which is at least that. The winner has to agree with the dense product ``checks`` times. splits: slices of
    the reduction axis to try too, where the library is called directly; none of it has run on a GPU. The device is waited for.
    """
    out, tokens = weight.shape[0], x.shape[0]
    if tokens < LEAST or min(weight.shape) < max(least, LEAST):
        return 0
    wanted = functional.linear(x, weight, bias)
    wanted = wanted.relu() if activation else wanted
    bias = bias if bias is None else aligned(bias.contiguous())
    dense, direct = operand(x), binding(x.device)
    if direct is None:
        winner = _asked(packed, dense, bias, rows)
    else:

        def right(y: Tensor) -> bool:
            return agrees((y if rows else y.t())[:tokens], wanted)

        winner = fastest(direct, packed, dense, bias, right, out, rows=rows, activation=activation, splits=splits)
    if winner <= 0:
        return 0
    for _ in range(checks):
        found = multiply(packed, x, bias, out, rows=rows, algorithm=winner, activation=activation)
        if not agrees(found, wanted):
            logging.getLogger(__name__).warning(
                "algorithm %d of cuSPARSELt computes something else for %s and %d tokens: the default one is used",
                winner, list(weight.shape), tokens,
            )  # fmt: skip
            return 0
    return winner


class Searches:
    """`search` for results in rows, once for each size. least: as there."""

    def __init__(self, least: int = LEAST) -> None:
        self.least, self._winners = least, dict[Any, int]()

    def __call__(self, weight: Tensor, packed: Tensor, x: Tensor, bias: Tensor | None, activation: str = "") -> int:
        """The algorithm; tensors as in `search`."""
        key = (weight.device, weight.dtype, tuple(weight.shape), x.shape[0], bias is not None, activation)
        if key not in self._winners:
            found = search(weight, packed, x, bias, rows=True, activation=activation, least=self.least)
            self._winners[key] = found
        return self._winners[key]


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
