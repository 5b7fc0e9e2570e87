"""The plan of a live model, which grows: its weights are candidates until a graph reads them, and then sites or refused.

    nm.compile(model)       fc1 candidate    fc2 candidate    head candidate
    a call that reads two   fc1 planned      fc2 candidate    head refused: its state goes again
    a call that reads fc2   fc1 planned      fc2 planned      head refused

A decision stands. Copies that wait for their first call take over what the model decides that they were copied from.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.errors import NMError, Refusal, refuse_all
from nm_compiler.fragments.outline import opened_up
from nm_compiler.links import owner_at
from nm_compiler.live.candidates import candidates, guesses
from nm_compiler.methods.base import Method, state_of
from nm_compiler.pattern import PatternMap
from nm_compiler.sites.plan import HEAD, STEM, UNREAD, Plan, Site, find
from nm_compiler.state.attaching import recipe_tag
from nm_compiler.state.beside import MARK, RECIPE, Weight, learns, mark, register, unregister
from nm_compiler.state.sharding import in_shards
from nm_compiler.wording import several

_log = logging.getLogger(__name__)


class GrowingPlan:
    """What is decided on the weights of a live model, and the state that follows from it.

    candidates: those that no graph has read; sites: those that a graph has planned; refused: the rest; left: of these, those
    whose state goes with the next decision; loaded: candidates whose state is of a state_dict; version: counts up with every
    decision.
    """

    def __init__(
        self, model: nn.Module, method: Method, patterns: PatternMap, *, include: tuple[str, ...], exclude: tuple[str, ...]
    ) -> None:
        self.model, self.method, self.patterns, self.include, self.exclude = model, method, patterns, include, exclude
        self.candidates = candidates(model, patterns, include=include, exclude=exclude)
        self.sites: dict[str, Site] = {}
        self.left: dict[str, Site] = {}
        self.refused: dict[str, Refusal] = {}
        self.ops: dict[str, str] = {}
        self.loaded: frozenset[str] = frozenset()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim >= 2}
        self.version = 0
        self._twins: weakref.WeakSet[GrowingPlan] = weakref.WeakSet()

    def copied(self, model: nn.Module) -> GrowingPlan:
        """The same over a copy of the model; it takes over what is decided here from now on, unless it has decided itself."""
        twin = GrowingPlan.__new__(GrowingPlan)
        twin.__setstate__({**self.__getstate__(), "model": model})
        self._twins.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        own = {name: dict(getattr(self, name)) for name in ("candidates", "sites", "left", "refused", "ops")}
        return {**{name: value for name, value in self.__dict__.items() if name != "_twins"}, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _twins=weakref.WeakSet())

    @property
    def plan(self) -> Plan:
        """Planned weights and those that will be when a call reads them; refusals of the others."""
        both = {**self.candidates, **self.sites}
        sites = tuple(both[name] for name in self.shapes if name in both)
        refusals = tuple(self.refused.get(name, not_yet(name)) for name in self.shapes if name not in both)
        ops = {name: self.ops.get(name, both[name].op if name in both else "-") for name in self.shapes}
        return Plan(sites, refusals, self.shapes, ops)

    def undecided(self, names: Collection[str]) -> list[str]:
        """Which of the parameters ``names`` no graph has been planned on yet."""
        return [name for name in self.shapes if name in names and name not in self.sites and name not in self.refused]

    def take_in(self, names: Collection[str]) -> None:
        """Of the parameters ``names``, which a graph reads, refuse those that were not there yet at `nm.compile`."""
        fresh = {name for name in names if name not in self.shapes}
        own = {name: p for name, p in self.model.named_parameters() if name in fresh and p.ndim >= 2} if fresh else {}
        if own:
            self.shapes = {**self.shapes, **{name: tuple(parameter.shape) for name, parameter in own.items()}}
            self.refused.update({name: added(name) for name in own})
            self.version += 1
            _log.warning("%s: dense, %s", several(list(own), 3), added("").reason)

    def decide(self, program: GraphModule, *, whole: bool) -> None:
        """Plan the undecided weights that ``program`` reads: all of a call, or (not ``whole``) a part of one.

        In a part a weight counts as stem or head only if it is the model's first or last as well; as stem also in later calls,
        which may go on from what an earlier one computed, as a decoder does from an encoder.
        """
        check_parameters(self.model, self.shapes)
        graph = opened_up(self.model, program)
        plan = find(self.model, [graph], self.patterns, include=self.include, exclude=self.exclude, may_be_empty=True)
        doubtful = () if whole and not self.sites else (STEM,) if whole else (STEM, HEAD)
        ends = [r.where for r in plan.refusals if r.reason in doubtful and not self._is_end(r.where)]
        if ends:
            more = (*self.include, *ends)
            plan = find(self.model, [graph], self.patterns, include=more, exclude=self.exclude, may_be_empty=True)
        fresh = {site.name: site for site in plan.sites if site.name in self.undecided({site.name})}
        refused = [r for r in plan.refusals if r.reason != UNREAD and r.where in self.shapes and self.undecided({r.where})]
        lost = [refusal.where for refusal in refused if refusal.where in self.candidates]
        self._check_wrapped([*lost, *self.left])
        late = [name for name, site in fresh.items() if name not in self.candidates and self._learns(site)]
        for name in late:
            refused.append(too_late(name))
            del fresh[name]
            _log.warning("%s stays dense: %s", name, refused[-1].reason)
        self._apply(fresh, refused, plan.ops)
        if whole and not self.sites and not self.candidates:
            refuse_all(self.model, self.patterns, list(self.refused.values()), self.shapes)

    def _apply(self, fresh: Mapping[str, Site], refused: Collection[Refusal], ops: Mapping[str, str]) -> None:
        """Decisions on weights that nothing was decided on, here and in the copies that wait for their first call.

        An average of the weights is such a copy, never called while the model trains: it reads the model's state in order.
        """
        self.ops.update({name: op for name, op in ops.items() if op != "-" or name not in self.ops})
        self._drop([refusal.where for refusal in refused if self.undecided({refusal.where})])
        self.clear()
        new = {name: site for name, site in fresh.items() if self.undecided({name})}
        self.refused.update({refusal.where: refusal for refusal in refused if self.undecided({refusal.where})})
        for site in new.values():
            self._settle(site)
        self.sites = {name: self.sites[name] for name in self.shapes if name in self.sites}
        self.version += 1
        if RECIPE in self.model._buffers:
            self.model._buffers[RECIPE] = recipe_tag(self.model, self.plan, self.method)
        for twin in list(self._twins):
            twin._apply(fresh, refused, ops)

    def _is_end(self, name: str) -> bool:
        return name in (next(iter(self.shapes), None), next(reversed(self.shapes), None))

    def _learns(self, site: Site) -> bool:
        return any(learns(value) for value in self.method.state(site, Weight(site, self.model).value).values())

    def _check_wrapped(self, lost: Collection[str]) -> None:
        ddp = nn.parallel.DistributedDataParallel._active_ddp_module is not None
        held = [name for name in lost if self._is_held(name, ddp)]
        if held and ddp:
            raise NMError(
                f"{', '.join(held)}: turns out to stay dense now, but DistributedDataParallel waits for gradients of its "
                f"scores already. Run one batch through the model before wrapping it, or exclude={held}"
            )
        waited = [name for name in lost if self._is_held(name, ddp=True)]
        if waited and self._is_wrapped():
            _log.warning(
                "%s: turns out to stay dense now. If a DistributedDataParallel that was made before still trains this model, "
                "it waits for gradients of scores that are gone: run one batch through the model before wrapping it",
                ", ".join(waited),
            )
        if held:
            raise NMError(
                f"{', '.join(held)}: read for the first time now and stays dense, but fully_shard holds its state already. "
                f"Run what reads it once before fully_shard, or exclude={held}"
            )

    def _is_wrapped(self) -> bool:
        """Whether a call that goes past DistributedDataParallel, as a trainer's first validation, is of what one wraps."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return False
        wrappers = (each for each in gc.get_objects() if issubclass(type(each), nn.parallel.DistributedDataParallel))
        return any(self.model is module for each in wrappers for module in each.modules())

    def _is_held(self, name: str, ddp: bool) -> bool:
        """Whether a wrapper holds the state of a candidate, so that it cannot go any more."""
        weight = Weight(self.candidates.get(name) or self.left[name], self.model)
        if ddp:
            return self._learns(weight.site)
        state = [weight[suffix] for suffix in self.method.suffixes(weight.site)]
        return in_shards(self.model, name) and any(isinstance(value, nn.Parameter) for value in state)

    def _settle(self, site: Site) -> None:
        """A candidate is planned: keep its state where it fits, make it anew where the layout was guessed wrongly."""
        name = site.name
        self.method.check(site)
        known = self.candidates.pop(name, None)
        if known is None or (known.layout, known.blocks) != (site.layout, site.blocks):
            weight = Weight(site, self.model)
            fresh = state_of(self.method, site, weight.value)
            state = {suffix: getattr(weight.owner, f"{weight.leaf}_{suffix}", None) for suffix in fresh}
            wrong = known is not None and known.layout != site.layout
            if wrong and name in self.loaded and fits(self.method, site, state, fresh):
                wrong = False
            stale = self.method.state(known, weight.value) if known is not None and wrong else {}
            for suffix, value in fresh.items():
                here = state[suffix]
                if here is None:
                    register(self.model, {f"{name}_{suffix}": value})
                elif isinstance(value, nn.Parameter) and here.shape == value.shape:
                    if wrong and torch.equal(here, stale[suffix]):  # an optimizer may hold it
                        here.data.copy_(value.data)
                elif isinstance(value, nn.Parameter):
                    raise NMError(
                        f"{name} of shape {list(site.shape)} is summed over axis {site.in_axis}, unlike what was guessed, and "
                        f"its {suffix!r} would have another shape: give nm.compile example inputs; or take a method that "
                        "learns one number a weight, as LBC(scores='position')"
                    )
                elif here.shape != value.shape or wrong:
                    weight.owner._buffers[f"{weight.leaf}_{suffix}"] = value.to(weight.param.device)
            mark(self.model, [site])
        self.sites[name] = site

    def load(self, recipe: Mapping[str, Any] | None, state_dict: Mapping[str, Any], prefix: str) -> None:
        """A state_dict is loaded: that of a model whose weights were decided on knows the layouts that are guesses here.

        recipe: what its state belongs to, None for a dense one.
        """
        if recipe is None:
            self.loaded = frozenset()
            return
        self.forget([name for name in self.candidates if name not in recipe["weights"]], loaded_dense)
        self.loaded = frozenset(self.candidates)
        for name, site in list(self.candidates.items()):
            weight = Weight(site, self.model)
            state = {suffix: state_dict.get(f"{prefix}{name}_{suffix}") for suffix in self.method.suffixes(site)}
            others = [replace(site, layout=layout) for layout in guesses(site.shape, site.pattern)] if site.op == "-" else []
            fitting = (other for other in others if fits(self.method, other, state, self.method.state(other, weight.value)))
            other = next(fitting, site)
            if other.layout != site.layout:
                self._guess_again(other)

    def _guess_again(self, site: Site) -> None:
        """Lay the state of a candidate along another axis, unless an optimizer may hold some that would get another shape."""
        weight = Weight(site, self.model)
        fresh = state_of(self.method, site, weight.value)
        if any(learns(value) and value.shape != weight[suffix].shape for suffix, value in fresh.items()):
            return
        self.candidates[site.name] = site
        buffers = {f"{weight.leaf}_{suffix}": value for suffix, value in fresh.items() if not learns(value)}
        weight.owner._buffers.update(buffers)

    def _drop(self, names: Collection[str]) -> None:
        """Take the state of candidates off that stay dense after all."""
        self._take_off({name: self.candidates.pop(name) for name in names if name in self.candidates})

    def clear(self) -> None:
        """Take the state of what is refused already off as well."""
        self._take_off(self.left)
        self.left = {}

    def _take_off(self, gone: Mapping[str, Site]) -> None:
        for name, site in gone.items():
            weight = Weight(site, self.model)
            unregister(self.model, [f"{name}_{suffix}" for suffix in self.method.suffixes(site)])
            marked = weight.owner.__dict__.get(MARK, set())
            marked.discard(weight.leaf)
            if not marked:
                weight.owner.__dict__.pop(MARK, None)

    def forget(self, names: Collection[str], why: Callable[[str], Refusal]) -> None:
        """Candidates that are refused without a graph.

        Before the first call their state stays until the next decision, as that of others does: an optimizer that is built in
        between holds what it held in the run that a checkpoint is from.
        """
        gone = {name: self.candidates.pop(name) for name in names if name in self.candidates}
        if self.sites:
            self._take_off(gone)
        else:
            self.left |= gone
        self.refused.update({name: why(name) for name in names})
        self.version += 1


def fits(method: Method, site: Site, state: Mapping[str, Any], fresh: Mapping[str, Tensor]) -> bool:
    """Whether values can be those of a method beside a weight. fresh: what it would begin with there."""
    given = {suffix: value for suffix, value in state.items() if isinstance(value, Tensor)}
    if any(suffix not in given or given[suffix].shape != value.shape for suffix, value in fresh.items()):
        return False
    return method.problem(site, given) is None


def check_parameters(model: nn.Module, names: Collection[str]) -> None:
    """Raise NMError, before anything is decided, for a parameter that is lent as another tensor."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        held = owner_at(model, path)._parameters.get(leaf)
        if held is not None and not isinstance(held, nn.Parameter):
            raise NMError(
                f"{name} of this {type(model).__name__} is a plain tensor in this call, as torch.func.functional_call(model, "
                "tensors, x) puts one in the place of an nn.Parameter, and a live model knows its weights as parameters. "
                "Pass {name: nn.Parameter(tensor)}, or, to differentiate with respect to tensors that were computed, "
                "nm.compile(model, (x,)), whose graph takes them"
            )


def not_yet(name: str) -> Refusal:
    """Of a weight that has state, or none, and that no graph has shown."""
    return Refusal(name, "not read by any call so far")


def too_late(name: str) -> Refusal:
    """Of a weight that nothing told before the first graph, where the method learns something beside it."""
    return Refusal(name, f"its scores were needed before the optimizer: name it in include=[{name!r}] of nm.compile")


def added(name: str) -> Refusal:
    """Of a weight of a layer that the model was given later, as where three projections are joined into one."""
    return Refusal(name, "added after nm.compile: change layers before it, or nm.freeze first and nm.compile again")


def loaded_dense(name: str) -> Refusal:
    """Of a weight that has no state in a state_dict that came before the first call."""
    return Refusal(name, "dense in the state_dict that was loaded before the first call")
