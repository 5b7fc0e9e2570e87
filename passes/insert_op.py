"""Multiply with what an op makes of a weight and of the state beside it: the pass of methods that bring an op of their own.

before                          after
%w = self.fc.weight             %w = self.fc.weight                                # [out, in]
%y = aten.linear(%x, %w, %b)    %s = self.fc.weight_scale                          # state=("scale",)
                                %v = nm.soft_weight(%w, %s, 2, 4, 1)               # options(site) == (2, 4, 1)
                                %y = aten.linear(%x, %v, %b)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.errors import NMError
from nm_compiler.graph import getattr_path
from nm_compiler.ops.weights import stands_for_weight
from nm_compiler.rewrite import behind, call
from nm_compiler.sites.plan import Site


def insert_op(
    gm: GraphModule, *, sites: Sequence[Site], op: Any, options: Callable[[Site], tuple[Any, ...]], state: Sequence[str] = ()
) -> GraphModule:
    """Put ``op(weight, *state, *options(site))`` behind every site's weight.

    op: from `nm_compiler.ops.define.weight_op`, or an overload that says ``stands_for_weight = True``; state: suffixes of what
    the method registered beside the weight. Raises NMError for other ops, for state that is not there and for arguments that
    the op does not take.
    """
    if not (isinstance(op, torch._ops.OpOverload) and stands_for_weight(op)):
        raise NMError(
            f"insert_op(op={op}): nothing says that it stands for a weight, which would count as dense: make it by "
            "nm_compiler.ops.define.weight_op, or give torch.ops.<namespace>.<name>.default, stands_for_weight = True on it"
        )
    for site in sites:
        behind(gm, site.name, partial(_called, gm, site=site, op=op, options=options(site), state=state))
    return gm


def _called(gm: GraphModule, weight: Node, *, site: Site, op: Any, options: tuple[Any, ...], state: Sequence[str]) -> Node:
    return call(gm, op, (weight, *arguments(gm, site, op, state, options)), f"{weight.name}_masked")


def arguments(gm: GraphModule, site: Site, op: Any, state: Sequence[str], options: tuple[Any, ...]) -> list[Any]:
    """What ``op`` is called with behind its weight: the state, then the options. Raises NMError if it takes something else."""
    if not isinstance(options, (tuple, list)):
        raise NMError(
            f"{site.name} of shape {list(site.shape)}: the options of {op} are {options!r}: let options= return a tuple, "
            "such as (site.pattern.n, site.pattern.m, site.in_axis)"
        )
    for suffix in state:
        if not _is_there(gm, f"{site.name}_{suffix}"):
            raise NMError(
                f"insert_op(state={tuple(state)}): {site.name} of shape {list(site.shape)} has no state {suffix!r}; what the "
                "method's state() gives is what a pass can read"
            )
    wanted = op._schema.arguments[1:]
    least, given = sum(not each.has_default_value() for each in wanted), len(state) + len(options)
    if not least <= given <= len(wanted):
        takes = ", ".join(each.name for each in wanted) or "nothing"
        raise NMError(
            f"{site.name} of shape {list(site.shape)}: behind the weight {op} takes {takes}, but is given {given} arguments, "
            f"the state {tuple(state)} and the options {options}: name as many in state= and options= as it takes"
        )
    if any(isinstance(option, Tensor) for option in options):
        raise NMError(
            f"{site.name} of shape {list(site.shape)}: an option of {op} is a tensor, which no checkpoint would keep: give it "
            "as state, or as a number"
        )
    return [gm.graph.get_attr(f"{site.name}_{suffix}") for suffix in state] + list(options)


def _is_there(gm: GraphModule, name: str) -> bool:
    try:
        return getattr_path(gm, name) is not None
    except AttributeError:
        return False
