"""plan_bytes: what N:M training adds to every rank, counted from shapes alone, for models that fit on no machine here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.methods.base import Method
from nm_compiler.methods.bimask import BiMask
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.sites.plan import Site
from nm_compiler.streaming.planning import plan_tensors
from nm_compiler.streaming.tensor_file import FLOATING, Entry


@dataclass(frozen=True, slots=True)
class PlannedBytes:
    """Bytes on the rank that holds most, every tensor sharded along its first axis in equal parts, rounded up (FSDP2).

    weights: planned ones, N:M in training; dense: parameters, gradients and optimizer state of the whole model, as without
    N:M; state: what the method keeps beside the weights, by suffix; gradients, optimizer: of the state that learns.
    """

    weights: int
    dense: int
    state: Mapping[str, int]
    gradients: int
    optimizer: int

    @property
    def extra(self) -> int:
        """All that the method adds."""
        return sum(self.state.values()) + self.gradients + self.optimizer

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self.state.items()) or "no state"
        learned = f", gradients {self.gradients / 1e9:.2f}, optimizer {self.optimizer / 1e9:.2f}" if self.gradients else ""
        return f"{self.extra / 1e9:.2f} GB beside {self.dense / 1e9:.2f} GB of dense training ({kinds}{learned})"


def plan_bytes(
    weights: nn.Module | Mapping[str, Sequence[int]], *, pattern: PatternSpec = "2:4", method: Method | None = None,
    ranks: int = 1, dtype: torch.dtype = torch.bfloat16, moments: int = 2,
    include: Sequence[str] = (), exclude: Sequence[str] = (),
) -> PlannedBytes:  # fmt: skip
    """Bytes per rank of training ``weights`` with ``method`` (by default `BiMask`), from shapes: meta tensors will do.

    weights: a model on any device, or shapes by parameter name. Linears are planned as `nm_compiler.prune_checkpoint` does,
    by modules or by names; pattern, include and exclude as there; all of them in ``dtype``. ranks: over which FSDP2 cuts
    every tensor. moments: numbers that the optimizer keeps for a parameter, of its dtype: 2 for Adam, 1 for SGD with
    momentum. The method's own functions make the state, of a few rows of each weight.
    Raises NMError for options out of range, and if there is nothing to make N:M.
    """
    whole = isinstance(ranks, int) and isinstance(moments, int) and not isinstance(ranks, bool)
    if not whole or ranks < 1 or moments < 0:
        raise NMError(f"ranks={ranks!r}, moments={moments!r}: whole numbers, at least one rank and no fewer than 0 moments")
    code = next((name for name, known in FLOATING.items() if known == dtype), None)
    if code is None:
        raise NMError(f"dtype={dtype}: weights are trained in {', '.join(map(str, FLOATING.values()))}")
    model = weights if isinstance(weights, nn.Module) else None
    sizes = (
        {name: tuple(shape) for name, shape in weights.items()}
        if isinstance(weights, Mapping)
        else {name: tuple(parameter.shape) for name, parameter in weights.named_parameters()}
    )
    entries = {name: Entry(name, code, shape, 0, 0) for name, shape in sizes.items()}
    plan = plan_tensors(entries, PatternMap.parse(pattern), model=model, include=include, exclude=exclude)
    chosen = method or BiMask()
    state, learned = dict[str, int](), 0
    for site in plan.sites:
        chosen.check(site)
        for suffix, (row, learns) in _row(site, chosen, dtype).items():
            size = row * -(-site.out // ranks)
            state[suffix] = state.get(suffix, 0) + size
            learned += size if learns else 0
    everything = sum(_share(shape, ranks) for shape in sizes.values()) * dtype.itemsize
    planned = sum(_share(site.shape, ranks) for site in plan.sites) * dtype.itemsize
    return PlannedBytes(planned, (2 + moments) * everything, state, learned, moments * learned)


def _share(shape: Sequence[int], ranks: int) -> int:
    """Numbers of a tensor on the first rank."""
    return -(-shape[0] // ranks) * math.prod(shape[1:]) if shape else 1


def _row(site: Site, method: Method, dtype: torch.dtype) -> dict[str, tuple[int, bool]]:
    """Bytes that an output channel's state takes, by suffix, and whether it learns; from M rows, which have all there is."""
    rows = math.gcd(site.out, site.pattern.m)  # fewer where M does not divide them: no backward groups, as in the whole
    shape = [0, 0]
    shape[site.in_axis], shape[site.layout.out_axis] = site.shape[site.in_axis], rows
    made = method.state(replace(site, shape=tuple(shape)), torch.zeros(shape, dtype=dtype))
    return {name: (value.nbytes // rows, isinstance(value, nn.Parameter)) for name, value in made.items()}
