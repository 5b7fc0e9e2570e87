"""The first way to carry a mode: one exported graph, and the signature that every call must fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from nm_compiler.capture import records
from nm_compiler.capture.binding import bind, flat_copy
from nm_compiler.capture.bodies import is_body, program_text, programs
from nm_compiler.capture.signature import Signature
from nm_compiler.graph import Pass, has_side_effect, run
from nm_compiler.links import resized
from nm_compiler.ops.together import together
from nm_compiler.passes.gather_masks import gather_masks
from nm_compiler.passes.spell_out_autocast import spell_out_autocast
from nm_compiler.sites.plan import Plan


@dataclass
class Exported:
    """One mode of a model as one graph bound to it."""

    gm: GraphModule
    signature: Signature
    _gathered: tuple[Any, Callable[..., Any]] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, eager: bool = False) -> Any:
        """Run the graph. Raises NMError for a call that does not fit what was captured.

        eager: nothing compiles or traces this call, so mask ops may run many weights at a time, to the same bits.
        """
        recorded = torch.is_grad_enabled()
        program = self._eager_program() if eager else self.gm
        try:
            outputs = program(*self.signature.flatten(args, kwargs))
        except BaseException as error:
            torch._C._set_grad_enabled(recorded)  # where an op fails in a region without gradients
            problem = resized(self.gm) if isinstance(error, RuntimeError) else None
            if problem is not None:
                raise problem from error
            raise
        return pytree.tree_unflatten(list(outputs), self.signature.out_spec)

    def _eager_program(self) -> Callable[..., Any]:
        """The graph as `gather_masks` leaves it, over the same parameters and constants.

        It is this graph's module under other code, and made anew when that is compiled anew: nothing to copy, move or pickle.
        """
        code = type(self.gm).forward
        if self._gathered is None or self._gathered[0] is not code:
            twin = gather_masks(bind(flat_copy(self.gm.graph), self.gm, self.gm.__dict__["extras"]))
            twin.graph.eliminate_dead_code(is_impure_node=has_side_effect)
            twin.recompile()  # and no more: shapes are not asked for, and a graph that was moved may have none that fit
            changed = twin.graph.find_nodes(op="call_function", target=together)
            self._gathered = code, MethodType(type(twin).forward, self.gm) if changed else self.gm
        return self._gathered[1]

    @property
    def whole(self) -> GraphModule:
        """The graph that weights are planned on, regions of autocast opened up."""
        return spell_out_autocast(self.gm)

    def rewrite(self, passes: Sequence[Pass], plan: Plan) -> None:
        """Apply ``passes`` to the graph and the bodies in it."""
        _, *bodies = programs(self.gm)
        self.gm = run(self.gm, passes)
        for body in bodies:
            run(body, passes)

    def text(self) -> str:
        """The graph, and the bodies in it, as a program."""
        return program_text(self.gm)

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
