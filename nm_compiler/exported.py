"""The first way to carry a mode: one exported graph, and the signature that every call must fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from nm_compiler import records
from nm_compiler.bodies import is_body, programs
from nm_compiler.capture import bind, flat_copy
from nm_compiler.graph import Pass, run, show_graph
from nm_compiler.signature import Signature
from nm_compiler.sites import Plan


@dataclass
class Exported:
    """One mode of a model as one graph bound to it."""

    gm: GraphModule
    signature: Signature

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the graph. Raises NMError for a call that does not fit what was captured."""
        recorded = torch.is_grad_enabled()
        try:
            outputs = self.gm(*self.signature.flatten(args, kwargs))
        except BaseException:
            torch._C._set_grad_enabled(recorded)  # where an op fails in a region without gradients
            raise
        return pytree.tree_unflatten(list(outputs), self.signature.out_spec)

    @property
    def whole(self) -> GraphModule:
        """The graph that weights are planned on."""
        return self.gm

    def rewrite(self, passes: Sequence[Pass], plan: Plan) -> None:
        """Apply ``passes`` to the graph."""
        self.gm = run(self.gm, passes)

    def text(self) -> str:
        """The graph as a program."""
        return show_graph(self.gm)

    def copied(self, model: nn.Module, memo: dict[int, Any]) -> Exported:
        """The same over a copy of the model."""
        return Exported(copied(self.gm, model, memo), self.signature)


def copied(gm: GraphModule, model: nn.Module, memo: dict[int, Any]) -> GraphModule:
    """A copy of a bound graph over ``model``, a copy of the model it was bound to."""
    extras = {
        name: copied(value, model, memo) if is_body(value) else copy.deepcopy(value, memo)
        for name, value in gm.__dict__["extras"].items()
    }
    twin = bind(flat_copy(gm.graph), model, extras)
    twin.meta.update({key: value for key, value in gm.meta.items() if key == "from"})
    return twin


def moved(gm: GraphModule, fn: Callable[[Tensor], Tensor]) -> None:
    """Constants and frozen devices of a graph and its bodies follow the model."""
    for each in programs(gm):
        extras = each.__dict__["extras"]
        for name, value in extras.items():
            if isinstance(value, Tensor):
                extras[name] = each.__dict__[name] = fn(value)
        records.move_devices(each, fn)
