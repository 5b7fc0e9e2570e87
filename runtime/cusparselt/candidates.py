"""The products of planned weights in a graph, each with every reason why it cannot be lowered."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import value_of
from nm_compiler.graph import arguments_of, target_name
from nm_compiler.runtime.cusparselt.eligible import MIN_TOKENS, Machine, Product, machine_of, reasons
from nm_compiler.runtime.cusparselt.unfold import geometry_of, matrix_of
from nm_compiler.sites.plan import Site
from nm_compiler.sites.uses import constants
from nm_compiler.solvers.check import worst_group

aten = torch.ops.aten

LINEAR = aten.linear.default
CONV2D = (aten.conv2d.default, aten.conv2d.padding)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A product that reads the weight of ``site``.

    node: the product; weight: its argument that depends on the weight and on constants alone; reasons: why it
    stays dense, none if it can be lowered.
    """

    site: Site
    node: Node
    weight: Node
    product: Product
    reasons: tuple[str, ...]


def candidates(
    gm: GraphModule,
    sites_by_read: Mapping[str, Site],
    *,
    machine: Machine | None = None,
    min_tokens: int = MIN_TOKENS,
    unfold: bool = False,
) -> list[Candidate]:
    """Every product of a planned weight, in the order of the graph. Changes nothing.

    gm: frozen and cast; sites_by_read: what a ``get_attr`` node reads -> its site.
    machine: in place of what torch says of each weight's device; min_tokens: fewer are a reason; unfold: whether convolutions
    that need a copy of their input count.
    """
    fixed = constants(gm.graph)
    found = [
        _judged(gm, site, node, weight, partial(reasons, min_tokens=min_tokens, unfold=unfold), machine)
        for read in gm.graph.nodes
        if read.op == "get_attr" and (site := sites_by_read.get(str(read.target))) is not None
        for node, weight in _products(read, fixed)
    ]
    place = {node: number for number, node in enumerate(gm.graph.nodes)}
    return sorted(found, key=lambda candidate: place[candidate.node])


def _products(read: Node, fixed: Collection[Node]) -> Iterator[tuple[Node, Node]]:
    """What multiplies data with the weight, through slices, views and other constant expressions."""
    stack, seen = [read], {read}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or user.op == "output":
                continue
            if user in fixed:
                seen.add(user)
                stack.append(user)
            else:
                yield user, node


def _judged(
    gm: GraphModule, site: Site, node: Node, weight: Node, judge: Callable[[Product, Machine], Any], machine: Machine | None
) -> Candidate:
    value: Tensor = value_of(gm, weight)
    product = describe(node, weight, value, site)
    why: tuple[str, ...] = judge(product, machine or machine_of(value.device))
    if not why and not value.is_meta and worst_group(matrix_of(value), 4, 1) > 2:
        why = ("the weight has more than 2 non-zeros in some group of 4 along its inputs: freeze the model first",)
    return Candidate(site, node, weight, product, why)


def describe(node: Node, weight: Node, value: Tensor, site: Site) -> Product:
    """The facts of one product, read off its node. value: what ``weight`` is."""
    shape, name = tuple(value.shape), target_name(node.target).rpartition("aten.")[2].partition(".")[0]
    if len(node.args) < 2 or node.args[1] is not weight or node.target not in (LINEAR, *CONV2D):
        return Product(
            name if node.target not in (LINEAR, *CONV2D) else f"{name} of a weight", shape, value.dtype, site.pattern
        )
    sizes = node.meta["val"].shape
    if node.target is LINEAR:
        return Product("linear", shape, value.dtype, site.pattern, _hint(sizes[:-1]))
    groups = int(arguments_of(node)["groups"])
    pixels = _hint((*sizes[:-3], *sizes[-2:]))
    return Product("conv2d", shape, value.dtype, site.pattern, pixels, geometry_of(node, shape[2:]), groups)


def _hint(sizes: Any) -> int | None:
    """How many tokens the example had; None where no example tells."""
    count = math.prod(sizes)
    if isinstance(count, int):
        return count
    hint = getattr(count.node, "hint", None)
    return None if hint is None else int(hint)
