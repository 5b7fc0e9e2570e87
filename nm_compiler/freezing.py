"""freeze: the masks go into the weights, and the user's own module comes back.

    decided?  ──►  every mask exactly N:M?  ──►  plain graphs beside  ──►  zeros in the weights, state and graphs gone

No weight is written before all that can fail is done; masks that were decided are put back if something does, Ctrl-C too.
The last step is gone through to its end, a weight at a time, so that one of them is in memory twice and not all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from nm_compiler.capture.binding import bind, flat_copy
from nm_compiler.capture.turns import in_turn
from nm_compiler.carrier import Carrier
from nm_compiler.errors import NMError
from nm_compiler.evaluate import value_of
from nm_compiler.graph import run
from nm_compiler.methods.base import Method
from nm_compiler.passes.check_pattern import check_pattern
from nm_compiler.passes.freeze_masks import Folding
from nm_compiler.recipe import freezing
from nm_compiler.rewrite import masked_nodes
from nm_compiler.solvers.check import worst_group
from nm_compiler.state.attaching import check_finite
from nm_compiler.state.averaged import COPY_THEM
from nm_compiler.state.beside import Weight, check_apart, learns
from nm_compiler.state.sharding import is_sharded, sharded_freeze
from nm_compiler.unwrapping import unwrap


@in_turn
def freeze(sparse: nn.Module, *, finish: bool = False) -> nn.Module:
    """Write the masks into the weights and give back the user's own module, its state_dict plain and exactly N:M.

    sparse: what `compile` returned, also inside DDP or ``torch.compile``; it cannot be used afterwards.
    finish: decide at once what training has not decided yet (LBC before t_f).

    Returns the module that was given to `compile`, the method's state taken off it.
    Raises NMError, nothing changed, if masks are undecided and not ``finish``, or if a weight is in shards, not finite, or was
    tied to another since `compile`.
    """
    module = unwrap(sparse)
    if module.frozen:
        raise NMError(
            "this model is frozen already: use what the first nm.freeze returned, the model that nm.compile was given"
        )
    weights = module.ready()
    cut = next((weight for weight in weights if is_sharded(weight.param)), None)
    if cut is not None:
        raise sharded_freeze(cut.site)
    check_apart(weights, module.method.suffixes)
    check_finite({weight.site.name: weight.param for weight in weights})
    open_ones = [weight for weight in weights if not module.method.is_settled(weight)]
    if open_ones and not finish:
        raise _undecided(module, open_ones, len(weights))
    before, last = list[tuple[Tensor, Tensor]](), None
    try:
        _settle(module, open_ones, before)
        programs = module.programs()
        last = _LastStep(module, [(gm, _plain(gm, module)) for gm in programs], Folding(programs))
        last.go_on()
    except BaseException:
        if last is None:
            _put_back(before)
        else:
            last.go_on()
        raise
    model: nn.Module = module.origin
    return model


def _settle(module: Carrier, open_ones: Sequence[Weight], before: list[tuple[Tensor, Tensor]]) -> None:
    """Decide the masks of ``open_ones``, then look at all masks. Raises NMError if one is not N:M.

    before: gets the state that is written to, and what it was.
    """
    method = module.method
    state = [weight[suffix] for weight in open_ones for suffix in method.suffixes(weight.site)]
    before += [(tensor, tensor.detach().clone()) for tensor in state if not learns(tensor)]
    with torch.no_grad():
        for weight in open_ones:
            method.settle(weight)
    _check_settled(method, open_ones)
    _check_masks(module)


def _plain(gm: GraphModule, module: Carrier) -> Graph:
    """A copy of the graph, without masks, over weights that will hold what these leave of them."""
    graph: Graph = run(bind(flat_copy(gm.graph), module.origin, gm.__dict__["extras"]), freezing()).graph
    return graph


@dataclass(frozen=True, slots=True)
class _LastStep:
    """Masks into the weights, plain graphs in the places of the others, state off; once more where it was interrupted."""

    module: Carrier
    plain: Sequence[tuple[GraphModule, Graph]]
    folding: Folding

    def go_on(self) -> None:
        self.folding.go_on()
        for gm, graph in self.plain:
            check_pattern(gm, sites=self.module.plan.sites)
            gm.graph = graph
        self.module.retire()


@torch.no_grad()
def _put_back(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in reversed(before):
        tensor.copy_(value)


def _undecided(module: Carrier, open_ones: Sequence[Weight], count: int) -> NMError:
    """What to say where some of ``count`` weights are not N:M yet."""
    first = open_ones[0].site
    why = (module.method.remark(open_ones[0]) or "its mask is not decided").removeprefix("training: ")
    return NMError(
        f"{len(open_ones)} of {count} weights are not {first.pattern} yet (first {first.name} of shape "
        f"{list(first.shape)}): {why}. {_how_far(module)}, or "
        "nm.freeze(sparse, finish=True) decides now, at a cost in accuracy"
    )


def _how_far(module: Carrier) -> str:
    """How to go on until masks are decided."""
    known = module.copy_known
    if known is not None and module.progress == known.made_at and (known.told or not known.loaded):
        step, total = known.made_at or (0, 0)
        when = f"This is a copy of step {step} of {total}, when masks were not decided: choose the best model among later ones"
        never = "No SparsityScheduler has stepped this copy of the model that trains"
        return f"{when if step else never}. {COPY_THEM}, then freeze it"
    if module.progress is None:
        return "No SparsityScheduler was made for this model: train with one"
    step, total = module.progress
    if step == 0:
        return f"Its SparsityScheduler has counted none of {total} steps: call its step() after every optimizer.step()"
    if step == total:
        return (
            f"All {total} steps are over, so this state was loaded from before masks are decided: load some from after that. "
            "Or the last step() was interrupted: call it once more"
        )
    return f"Its SparsityScheduler has counted {step} of {total} steps: train on"


def _check_settled(method: Method, weights: Sequence[Weight]) -> None:
    for weight in weights:
        if not method.is_settled(weight):
            raise NMError(
                f"{weight.site.name} of shape {list(weight.site.shape)} is not {weight.site.pattern} after "
                f"{method.name}.settle(): that has to decide what {method.name}.is_settled() asks for"
            )


def _check_masks(module: Carrier) -> None:
    """Every mask is exactly N:M, checked before the first weight is written."""
    programs = module.programs()
    for weight in module.ready():
        site = weight.site
        for gm in programs:
            for node in masked_nodes(gm, site.name):
                fullest = worst_group(value_of(gm, node), site.pattern.m, site.in_axis)
                if fullest > site.pattern.n:
                    raise NMError(
                        f"{site.name} of shape {list(site.shape)}: its mask keeps {fullest} of {site.pattern.m} in a "
                        f"group, not {site.pattern}, although {module.method.name}.is_settled() says so: either that is "
                        "wrong, or the state beside it was edited, and a healthy checkpoint has to be loaded"
                    )
