"""The products of a lowered graph that read a planned weight: what a backend is told, and what the report says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from nm_compiler.graph import arguments_of, getattr_path
from nm_compiler.layout import Layout
from nm_compiler.rewrite import weight_of
from nm_compiler.scaled import value_if_scaled
from nm_compiler.sites.plan import Site
from nm_compiler.sites.uses import CONVS
from nm_compiler.solvers.check import worst_group

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One product with an N:M constant, as it stands before a backend takes it.

    node: its name in the graph; read: the constant it reads; site: of that constant, groups along axis 1.
    """

    node: str
    read: str
    site: Site
    dtype: torch.dtype


@dataclass(frozen=True)
class Decision:
    """What became of a product: kernel names what runs it, empty if it stayed dense, and then reasons say why.

    dense_s, sparse_s: seconds a call, where both were measured; hint: the one change that would make a difference.
    """

    kernel: str = ""
    reasons: tuple[str, ...] = ()
    hint: str = ""
    eligible: bool = False
    dense_s: float | None = None
    sparse_s: float | None = None
    bytes: int | None = None


def products(gm: GraphModule, sites: Mapping[str, Site]) -> Iterator[Product]:
    """All products of ``gm`` with a constant made of a planned weight. sites: by the parameter's name."""
    for node in gm.graph.nodes:
        weight = node.args[1] if len(node.args) > 1 else None
        if not isinstance(weight, Node) or weight.op != "get_attr" or not is_product(node):
            continue
        name = weight_of(weight)
        if name is None or name not in sites:
            continue
        value = getattr_path(gm, weight.target)
        groups = conv_groups(node)
        site = replace(sites[name], shape=tuple(value.shape), layout=Layout(1, 0), conv_groups=groups, op=_op(node))
        yield Product(node.name, str(weight.target), site, value.dtype)


def unread(gm: GraphModule, sites: Mapping[str, Site]) -> dict[str, str]:
    """Planned weights that no product of the lowered graph reads as a constant, and why not."""
    found = {product.site.name for product in products(gm, sites)}
    readers: dict[str, str] = {}
    for node in gm.graph.nodes:
        for operand in node.all_input_nodes:
            name = weight_of(operand) if operand.op == "get_attr" else None
            if name is not None and name in sites and name not in found:
                readers.setdefault(name, str(node.target).removeprefix("aten.").partition(".")[0])
    return {name: _unread(readers.get(name)) for name in sites if name not in found}


def _unread(reader: str | None) -> str:
    if reader is None:
        return "no product reads it in evaluation mode, so nothing would get faster"
    way_out = "write the product as a linear, of experts as one for each"
    return f"read by {reader}, for which no runtime here has sparse kernels: {way_out}"


def check_zeros(gm: GraphModule, sites: Mapping[str, Site]) -> str | None:
    """The first constant that is no longer N:M along its reduction axis, described; None if all are."""
    for product in products(gm, sites):
        site = product.site
        fullest = worst_group(value_if_scaled(getattr_path(gm, product.read)), site.pattern.m, 1)
        if fullest > site.pattern.n:
            return f"{site.name} of shape {list(site.shape)} has {fullest} non-zeros in a group of {site.pattern.m}"
    return None


def is_product(node: Node) -> bool:
    """Whether it is a form that backends read: a linear or a convolution."""
    return node.target is aten.linear.default or node.target in CONVS


def conv_groups(node: Node) -> int:
    """How many conv groups a product has: 1 for a linear."""
    return 1 if node.target is aten.linear.default else int(arguments_of(node)["groups"])


def _op(node: Node) -> str:
    return "linear" if node.target is aten.linear.default else CONVS[node.target]  # type: ignore[index]
