"""A whole graph, packed against dense: products that win one by one can lose together.

What lies between products (layouts, fused additions, a pass over memory saved) is not seen by timing each of them. So the
graph is timed once more as a whole, against eager torch, or also against inductor, which takes long to compile a large model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nm_compiler.graph import written_by
from nm_compiler.memory import give_back
from nm_compiler.runtime.choose import Timing, side_by_side
from nm_compiler.scaled import stood_in
from nm_compiler.written import as_before, names_of

ENOUGH = 0.98
"""Packed stays unless it is slower than this times dense: below lies more than noise."""


@dataclass(frozen=True)
class Whole:
    """Seconds a call by way: "eager" and "inductor" are dense, those that begin with "packed" are not. best: of the latter."""

    seconds: dict[str, float]
    best: str = "packed"

    @property
    def rival(self) -> str:
        """The best dense way that was timed: eager alone unless inductor was asked for."""
        return min((way for way in self.seconds if not way.startswith("packed")), key=self.seconds.__getitem__)

    @property
    def speedup(self) -> float:
        """The best packed way over the best dense one."""
        return self.seconds[self.rival] / min(value for way, value in self.seconds.items() if way.startswith("packed"))

    @property
    def packed_wins(self) -> bool:
        """Whether packed is faster than dense, or as fast within noise."""
        return self.speedup >= ENOUGH

    def __str__(self) -> str:
        ways = "; ".join(f"{way} {value * 1e3:.3g} ms" for way, value in self.seconds.items())
        return f"Whole graph: {ways}. The best packed one is {self.speedup:.2f}x as fast as {self.rival}."


def compared(dense: GraphModule, packed: Mapping[str, GraphModule], flat: Sequence[Any], *, inductor: bool) -> Whole:
    """All graphs on the example inputs, in turn. packed: by way; with more than one, the last stays only if it is faster.

    Weights that are not computed yet are stood in for: results are not read.
    """
    device = next((value.device for value in flat if isinstance(value, Tensor)), torch.device("cpu"))
    best, *others = packed

    def timed(one: Callable[[], object], other: Callable[[], object]) -> Timing:
        give_back()
        return side_by_side(one, other, device, rounds=5)

    with torch.no_grad(), stood_in(dense, *packed.values(), read=True):
        seconds = dict[str, float]()
        for way in others:
            found = timed(_anew(packed[best], flat), _anew(packed[way], flat))
            seconds |= {best: found.dense_s, way: found.sparse_s}
            best = way if found.sparse_wins else best
        found = timed(_anew(dense, flat), _anew(packed[best], flat))
        seconds = {"eager": found.dense_s, **seconds, best: found.sparse_s}
        if inductor:
            found = timed(_compiled(dense, flat), _compiled(packed[best], flat))
            seconds |= {"inductor": found.dense_s, f"{best}, inductor": found.sparse_s}
    return Whole(seconds, best)


def _compiled(graph: GraphModule, flat: Sequence[Any]) -> Callable[[], object]:
    """As a user would compile it for inference: constants are folded and laid out once."""
    with torch._inductor.config.patch(freezing=True):
        made = _anew(graph, flat, torch.compile(graph))
        made()
    return made


def _anew(graph: GraphModule, flat: Sequence[Any], run: Callable[..., object] | None = None) -> Callable[[], object]:
    """A call that finds inputs and state as they were: a static cache that every call writes to would be full after a few."""
    call, written = graph if run is None else run, _written(graph)
    if not written and not names_of(graph):
        return partial(call, *flat)

    def anew() -> object:
        with as_before(graph):
            return call(*(value.clone() if place in written else value for place, value in enumerate(flat)))

    return anew


def _written(graph: GraphModule) -> set[int]:
    """Places of the inputs that an op writes to, itself or through a view."""
    written = {base for node in graph.graph.nodes for base in written_by(node)}
    return {place for place, node in enumerate(graph.graph.find_nodes(op="placeholder")) if node in written}
