"""Send the input gradient of every product through what an op makes of the masked weight: a backward mask of one's own.

    before                              after
    %w = self.fc.weight                 %w = self.fc.weight                        # [out, in]
    %v = mine.forward(%w, 2, 4, 1)      %v = mine.forward(%w, 2, 4, 1)             # W * F
    %y = aten.linear(%x, %v, %b)        %s = self.fc.weight_noise                  # state=("noise",)
                                        %u = mine.backward(%v, %s, 2, 4, 0)        # W * B, options(site) == (2, 4, 0)
                                        %y = nm.linear(%x, %v, %u, %b)             # dx = g (W * B), dW = g^T x

It runs behind any pass that masks the forward weight, as `insert_bimask` does, whose backward mask is Bi-Mask's. Safe because
y does not read %u: only the gradient of x changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from nm_compiler.errors import NMError
from nm_compiler.graph import getattr_path, reads
from nm_compiler.ops.weights import makes_backward
from nm_compiler.passes.insert_op import arguments
from nm_compiler.rewrite import call, following
from nm_compiler.sites.plan import Site
from nm_compiler.sites.uses import constants
from nm_compiler.two_weights import give_second


def insert_backward_op(
    gm: GraphModule, *, sites: Sequence[Site], op: Any, options: Callable[[Site], tuple[Any, ...]], state: Sequence[str] = ()
) -> GraphModule:
    """Put ``op(masked weight, *state, *options(site))`` into the input gradient of every product of ``sites``.

    op: from `nm_compiler.ops.define.backward_op`; state: suffixes of what the method registered beside the weight; sites:
    leave out those that have no such mask, as where M does not divide the output channels (``site.backward_groups``).
    Raises NMError for other ops, for state that is not there or would never learn, for arguments that the op does not take.
    """
    if not (isinstance(op, torch._ops.OpOverload) and makes_backward(op)):
        raise NMError(f"insert_backward_op(op={op}): make it by nm_compiler.ops.define.backward_op")
    fixed = constants(gm.graph)
    for site in sites:
        give_second(gm, site, fixed, partial(_called, gm, site=site, op=op, options=options(site), state=state))
        _check_learns(gm, site, op, state)
    return gm


def _check_learns(gm: GraphModule, site: Site, op: Any, state: Sequence[str]) -> None:
    """Raise NMError for state that learns and that nothing but ``op`` reads, whose gradient passes it by."""
    for name in (f"{site.name}_{suffix}" for suffix in state):
        found, value = reads(gm, name), getattr_path(gm, name)
        alone = bool(found) and all(user.target is op for read in found for user in read.users)
        if alone and isinstance(value, nn.Parameter) and value.is_floating_point():
            raise NMError(
                f"{name} of shape {list(value.shape)} is a Parameter, but only {op} reads it, which has no gradient for "
                "it, so it would never learn. Give it as a plain tensor that Method.advance() changes, or read it in the "
                "weight_op too"
            )


def _called(gm: GraphModule, forward: Node, *, site: Site, op: Any, options: tuple[Any, ...], state: Sequence[str]) -> Node:
    with following(forward):
        given = (forward, *arguments(gm, site, op, state, options))
        return call(gm, op, given, f"{forward.name.removesuffix('_masked')}_backward")
