"""Prepared: the carrier of a live model. Its weights have their state now, its graphs come from TorchDynamo at its calls.

    nm.compile(model)  ──►  candidates get state, modules get entries
    model(x)           ──►  fragments, planned (`nm_compiler.live.growing`) and rewritten as they come
    nm.freeze(model)   ──►  zeros in the weights, state and entries gone

The model stays the user's own object: its methods, its hooks and its control flow are what they were.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.carrier import CARRIER
from nm_compiler.errors import NMError
from nm_compiler.evaluate import effective_weights
from nm_compiler.fragments.dynamo_errors import check_around
from nm_compiler.links import Link, links, owner_at, replaced
from nm_compiler.live.entries import install, remove
from nm_compiler.live.growing import GrowingPlan, check_parameters, not_yet
from nm_compiler.live.methods import MethodEntry
from nm_compiler.live.saving import unwatch_saving, watch_saving
from nm_compiler.live.tracers import refuse_tracers
from nm_compiler.live.weights_graph import weights_graph
from nm_compiler.methods.base import Method
from nm_compiler.pattern import PatternMap
from nm_compiler.sites.plan import Plan, Site
from nm_compiler.state.attaching import attach_state, detach_state, recipe_tag, state_names
from nm_compiler.state.averaged import Copied, checked_copy, loaded
from nm_compiler.state.beside import MARK, RECIPE, Weight, check_free, check_there, gone, read_recipe
from nm_compiler.state.chosen import counted
from nm_compiler.state.loading import check_values, compare, keep_state, start_afresh
from nm_compiler.state.sharding import cut_like, parts, reshard
from nm_compiler.wording import several

_log = logging.getLogger(__name__)
_LONG_S = 120.0  # a call that waits longer for its turn says so: compiling takes a minute, waiting for oneself never ends


class Prepared:
    """A model that trains with N:M weights while it stays an ordinary module.

    growing: what is decided on its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        patterns: PatternMap,
        *,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        seed: int = 0,
        then: str = "inductor",
    ) -> None:
        self.origin, self.method, self.patterns, self.seed, self.then = model, method, patterns, seed, then
        self.notes: tuple[str, ...] = ()
        self.frozen = self.active = self.looked = self.bare = False
        self._hook: Any = None  # on loading
        self.calls = self.loads = 0
        self.progress: tuple[int, int] | None = None
        self.made_of: Mapping[str, int] | None = None
        self.copy_known: Copied | None = None
        self.include, self.exclude = include, exclude
        self.growing = GrowingPlan(model, method, patterns, include=include, exclude=exclude)
        self.begin()

    def begin(self) -> None:
        """Forget what was compiled: the graphs of the next call are new, of the same plan."""
        self._live: Any = None
        self._weights_graph: tuple[int, GraphModule] | None = None  # and the version of the plan that it is of
        self._links: list[Link] | None = None
        self._held: tuple[int, list[tuple[dict[str, Any], str, str]]] | None = None  # of that version of the plan
        self._company: int | None = None  # how many processes there were when graphs were made
        self._turn = threading.RLock()  # calls from several threads take turns
        self.thread: int | None = None  # whose turn it is, or was

    @property
    def live(self) -> Any:
        """The fragments; TorchDynamo is imported at the first call."""
        if self._live is None:
            from nm_compiler.live.live import Live

            self._live = Live(self)
        return self._live

    @property
    def sites(self) -> Mapping[str, Site]:
        """The weights that a graph has planned."""
        return self.growing.sites

    @property
    def candidates(self) -> Mapping[str, Site]:
        """Those that no graph has read yet."""
        return self.growing.candidates

    # -- state beside the weights --------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Register the state of all candidates, the recipe and the entries on the model. All or nothing."""
        check_free(self.origin, state_names(self.plan, self.method))
        try:
            attach_state(self.origin, self.plan, self.method)
            self.origin.__dict__[CARRIER] = self
            self._hook = self.origin.register_load_state_dict_pre_hook(load_hook)
            install(self, self.candidates)
            watch_saving(self.origin, self)
            self.made_of = counted(self.weights)
            self._check_modules()
        except BaseException:
            self.retire()
            raise

    def retire(self) -> None:
        """Take everything off the model: state, marks, entries."""
        self._live = self._weights_graph = None
        detach_state(self.origin, self.plan, self.method)
        self.growing.clear()
        remove(self.origin)
        unwatch_saving(self.origin)
        if self._hook is not None:
            self._hook.remove()
        self.origin.__dict__.pop(CARRIER, None)
        self.frozen = True

    # -- running -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(self, module: nn.Module | MethodEntry, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model, or a part or method of it that is called by itself. Raises NMError where a weight would be dense."""
        from nm_compiler.capture.routes import way_back
        from nm_compiler.live.live import Undecided

        refuse_tracers(self.origin)
        self._check_modules()
        self._check_parameters()
        self._check_options()
        self._check_company()
        if self.copy_known is not None and not (self.origin.training and torch.is_grad_enabled()):
            self.copy_known = checked_copy(self, self.copy_known)
        if not self.sites and parts(self.origin):  # FSDP2's hooks break the graph: stem and head could not be told
            raise NMError(
                f"this {type(self.origin).__name__} was in shards before its first call, which plans it: run one batch "
                "through the model after nm.compile and before fully_shard (on the meta device if it is large)"
            )
        with self._inside():
            back = way_back(self.origin) if self.candidates or not self.looked else None
            try:
                result = self.live.call(module, args, kwargs)
            except Undecided:
                if back is not None:  # what ran before the weight was met is run again
                    back()
                with self.live.taking_parts():
                    if module is self.origin:
                        self._look(args, kwargs)
                    result = self.live.call(module, args, kwargs)
        self._check_read()
        self.calls += 1
        self.looked = True
        if self.calls == 1:
            self._tell_unread()
        return result

    def is_inside(self) -> bool:
        """Whether this is part of a call of the model: on the thread whose turn it is, or where TorchDynamo traces one."""
        return self.active and (torch.compiler.is_dynamo_compiling() or self.thread in (None, threading.get_ident()))

    def _check_company(self) -> None:
        """Make graphs anew once processes have met: TorchDynamo holds what ``forward`` asked torch.distributed for good."""
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        company = torch.distributed.get_world_size() if there else 0
        if self._company is not None and self._company != company and not self.active:
            self.begin()
        self._company = company

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        if not self._turn.acquire(timeout=_LONG_S):
            _log.warning(
                "a call of this %s has waited %g s for one in another thread: a model compiled without inputs takes them in "
                "turn. If its forward calls its own layers from other threads, this never ends: let it call them itself",
                type(self.origin).__name__, _LONG_S,
            )  # fmt: skip
            self._turn.acquire()
        try:
            self.thread = threading.get_ident()
            self.active = True
            yield
        finally:
            self.active = False
            self._turn.release()

    def _look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the call once, dense and without a trace, to plan on all of its fragments together."""
        from nm_compiler.capture.routes import check_outside, copies_of, undone

        live = self.live
        copies = copies_of(args), {name: copies_of(value) for name, value in kwargs.items()}
        try:
            with undone(self.origin):
                whole = live.look(*copies)
            check_outside(self.origin, {self.origin.training: live}, self.patterns, self.include, self.exclude, captured=False)
            self.growing.decide(whole, whole=True)
            self.looked = True
            live.settle()
        except BaseException:
            live.forget()
            raise

    def _check_read(self) -> None:
        """Raise NMError if Python alone has read the weight of a layer, as in layers whose code TorchDynamo skips."""
        from nm_compiler.fragments.watching import outside_text

        for name, line in self.live.computed_with.items():
            if name in self.candidates and self.candidates[name].op != "-":
                raise NMError(outside_text(name, line, captured=False))

    def _check_modules(self) -> None:
        """Raise NMError if a layer that owns prepared weights is another one now."""
        if self._links is None:
            for name in (*self.sites, *self.candidates):
                path, _, leaf = name.rpartition(".")
                if leaf not in owner_at(self.origin, path).__dict__.get(MARK, ()) and not self.bare:
                    raise replaced(path)
            self._links = list(links(self.origin, self._owners()))
        moved = [path for children, key, expected, path in self._links if children.get(key) is not expected]
        if moved:
            self._follow(moved)

    def _check_parameters(self) -> None:
        """Raise NMError for a planned weight that is none of its layer's parameters now: TorchDynamo may compile nothing."""
        if self._held is None or self._held[0] != self.growing.version:
            owners = [(name, *name.rpartition(".")[::2]) for name in self.sites]
            held = [(owner_at(self.origin, path)._parameters, leaf, name) for name, path, leaf in owners]
            self._held = self.growing.version, held
        for parameters, leaf, name in self._held[1]:
            if not isinstance(parameters.get(leaf), nn.Parameter):
                check_around(self.origin)  # torch.func lends tensors too, and has a way out of its own
                check_parameters(self.origin, [name])
                raise gone(name)

    def _follow(self, moved: Sequence[str]) -> None:
        """Containers may be others now, as models swap them in forward, if the layers in them are the same. Else NMError."""
        known = {path: module for _, _, module, path in self._links or ()}
        for path in self._owners():
            if path and owner_at(self.origin, path) is not known[path]:
                raise replaced(path if path in moved else moved[0])
        if not self.bare:
            install(self, [*self.sites, *self.candidates])
        self._links = list(links(self.origin, self._owners()))

    def _owners(self) -> list[str]:
        """The paths of the layers that own prepared weights, in the order of those: the first is named in errors."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in (*self.sites, *self.candidates)))

    def _check_options(self) -> None:
        """Raise NMError if a torch.compile around says other things than `nm.compile` did."""
        from nm_compiler.backend import check_same, outer_options

        said = outer_options(self.origin)
        if said is not None:
            check_same(self, said)

    def _tell_unread(self) -> None:
        if self.candidates:
            _log.warning(
                "%s: prepared, but not read by the first call; each becomes sparse in the first call that reads it",
                several(list(self.candidates), 3),
            )

    # -- what a carrier is asked -------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Planned weights and those that will be when a call reads them; refusals of the others."""
        return self.growing.plan

    @property
    def weights(self) -> list[Weight]:
        """All weights with state, in the model's order."""
        reshard(self.origin)
        return [Weight(site, self.origin) for site in self.plan.sites]

    @property
    def late(self) -> Mapping[str, str]:
        """Candidates that no call has read."""
        return {name: not_yet(name).reason for name in self.candidates}

    def ready(self) -> list[Weight]:
        """The weights that graphs were planned on; others are dropped. Raises NMError before the first call."""
        if not self.sites:
            kind = type(self.origin).__name__
            if not self.calls:
                raise NMError(f"this {kind} has not run since nm.compile, so no graph is known: call it once first")
            reasons = "\n  ".join(map(str, self.plan.refusals[:12]))
            raise NMError(f"no call of this {kind} so far has read a weight that can be {self.patterns}:\n  {reasons}")
        reshard(self.origin)
        return [Weight(site, self.origin) for site in self.sites.values()]

    def runs(self, name: str) -> int:
        """How many times a rewritten fragment that reads the weight has run."""
        if self._live is None:
            return 0
        return sum(v.calls for piece in self._live.pieces for v in piece.variants.values() if name in v.planned)

    def programs(self, training: bool | None = None) -> list[GraphModule]:
        """One graph that computes every weight that a call has read, as it is multiplied with."""
        return [weights_graph(self.origin, self.method, list(self.sites.values()))]

    def text(self, training: bool) -> str:
        """All programs so far, of both modes. Raises NMError before the first call."""
        self.ready()
        text: str = self.live.text()
        return text

    def masked(self, name: str) -> tuple[Tensor, Tensor | None]:
        """What the planned weight ``name`` is multiplied with now: forward, and backward under Bi-Mask."""
        if self._weights_graph is None or self._weights_graph[0] != self.growing.version:
            self._weights_graph = self.growing.version, weights_graph(self.origin, self.method, list(self.plan.sites))
        forward, backward = effective_weights(self._weights_graph[1], name)
        assert forward is not None, f"{name} is not planned"
        return forward, backward

    def masked_parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by name, planned weights as their masks leave them; what `verify` looks at."""
        check_there(self.weights)
        state = set(self.state_names())
        own = {name: p.detach() for name, p in self.origin.named_parameters() if name not in state}
        return {name: cut_like(self.masked(name)[0], p) if name in self.sites else p for name, p in own.items()}

    def state_names(self) -> list[str]:
        """The names of everything that was registered on the model."""
        left = [f"{name}_{suffix}" for name, site in self.growing.left.items() for suffix in self.method.suffixes(site)]
        return [*state_names(self.plan, self.method), *left]

    # -- loading and copying -----------------------------------------------------------------------------------------

    def fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Check the state below ``prefix`` before any of it is written; a dense state_dict gets fresh state."""
        tag = state_dict.get(prefix + RECIPE)
        if tag is None:
            self.growing.load(None, state_dict, prefix)
            start_afresh(self, state_dict, prefix)
        else:
            theirs = read_recipe(tag)
            self.growing.load(theirs, state_dict, prefix)
            compare(self, theirs, read_recipe(recipe_tag(self.origin, self.plan, self.method)))
            check_values(self, state_dict, prefix)
            self.copy_known = loaded(self)
            keep_state(self.origin, self.growing.left, self.method, state_dict, prefix)
        self.loads += 1
        tag = recipe_tag(self.origin, self.plan, self.method)
        self.origin._buffers[RECIPE] = state_dict[prefix + RECIPE] = tag  # also after to_empty, which forgets it

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__getstate__())
        twin.origin = copy.deepcopy(self.origin, memo)
        if not self.bare:
            twin._hook = copy.deepcopy(self._hook, memo)
        twin.growing = self.growing.copied(twin.origin)
        twin.copy_known = Copied(of=weakref.ref(self), made_at=self.progress)  # the twin of the model may be half made
        twin.begin()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        left = ("_live", "_weights_graph", "_links", "_held", "_turn", "_company", "thread")
        known = self.copy_known and replace(self.copy_known, of=None)  # which does not pickle
        own = {key: value for key, value in self.__dict__.items() if key not in left}
        return own | {"active": False, "looked": False, "copy_known": known, "made_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.begin()


def load_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a live model loads a state_dict."""
    module.__dict__[CARRIER].fit(state_dict, prefix)
