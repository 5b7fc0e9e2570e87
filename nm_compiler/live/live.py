"""Calls of a live model: their fragments are planned and rewritten when TorchDynamo hands them over.

    fragment ──lower──► aten ──decide──► plan ──passes──► program ──► `nm_compiler.live.pieces`

The first fragment that is a whole call plans the weights it reads. If the call comes in several, it is first run once to
be looked at (`Undecided`), as `nm.compile` does with example inputs: its fragments run dense, are planned on together, and
are then rewritten where they are, so that TorchDynamo traces the model's Python once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from nm_compiler.capture.bodies import names_read, program_text, programs
from nm_compiler.capture.routes import way_back
from nm_compiler.errors import NMError
from nm_compiler.fragments.dynamo import Fragments, entry_of, weakly
from nm_compiler.fragments.watching import PRODUCTS, outside_text, python_line
from nm_compiler.graph import reads, run
from nm_compiler.live.entries import check_compiled, entered
from nm_compiler.live.growing import check_parameters
from nm_compiler.live.pieces import LiveFragment
from nm_compiler.recipe import pipeline
from nm_compiler.sites.uses import Blocked, uses
from nm_compiler.state.sharding import is_sharded, parallel

if TYPE_CHECKING:
    from nm_compiler.live.prepared import Prepared


class Undecided(NMError):
    """A fragment reads weights that no plan is there for, and it is not the whole call."""


class Broken(NMError):
    """A call that nobody watches comes in parts: what runs between them has to be watched."""


@dataclass
class Attempt:
    """A call that nobody watches, in the hope that it is one fragment.

    ran: whether a fragment has run in it; in_parts: whether it is known to be more than one.
    """

    ran: bool = False
    in_parts: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether it was one fragment, and nothing outside it."""
        return self.ran and not self.in_parts


class Live(Fragments):
    """The fragments of a `Prepared` model, all modes and modules together."""

    follows_hooks = True

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.origin, {})
        self.prepared = prepared
        self.in_parts = prepared.bare  # whether a fragment that is not a whole call may be planned on
        self.pieces: list[LiveFragment] = []
        self.computed_with: dict[str, str] = {}  # weights that no graph had read and Python computed with, and its line
        self.attempt: Attempt | None = None  # the call that runs now, if nobody watches it
        self._watched: set[int] = set()  # modules whose calls come in parts
        self._tried: set[tuple[int, bool, bool]] = set()
        self._entries: dict[int, tuple[nn.Module, Callable[..., Any], Any]] = {}

    # -- running -----------------------------------------------------------------------------------------------------

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run ``module``, the model or a part of it, compiled: in one fragment, or else in several, watched in between."""
        if id(module) not in self._watched:
            mode = id(module), module.training, torch.is_grad_enabled()
            back = way_back(self.model) if mode not in self._tried else None  # it costs too much for every call
            self._tried.add(mode)
            attempt = self.attempt = Attempt()
            try:
                result = self.guarded(self._entry(module)[1], args, kwargs, watched=False)
                if attempt.succeeded:
                    return result
            except Broken:
                attempt.in_parts = True
            finally:
                self.attempt = None
            if back is not None:  # Python between fragments has run, and runs again
                back()
            self._watched.add(id(module))
            self._entries.pop(id(module), None)
            if attempt.in_parts and not self.prepared.looked and not self.in_parts:
                raise Undecided(type(self.model).__name__)  # its first fragment would say so, traced once more
        return self.guarded(self._entry(module)[1], args, kwargs)

    def _entry(self, module: nn.Module) -> tuple[nn.Module, Callable[..., Any], Any]:
        known = self._entries.get(id(module))
        if known is None:
            known = (module, *entry_of(module, self, breaks=id(module) in self._watched))
            self._entries[id(module)] = known
        return known

    def met_in_parts(self) -> None:
        """The running call comes in parts, as where Python calls a layer. Raises `Broken` if nobody watches it."""
        if self.attempt is not None:
            self.attempt.in_parts = True  # should the model catch what is raised
            raise Broken(type(self.model).__name__)

    @contextlib.contextmanager
    def taking_parts(self) -> Iterator[None]:
        """Inside, a fragment that is not a whole call may be planned on."""
        before, self.in_parts = self.in_parts, True
        try:
            yield
        finally:
            self.in_parts = before

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphModule:
        """Run the model once, dense, and return the outline of what ran. `settle` or `forget` has to follow."""
        self.runs = []
        try:
            self.guarded(self._entry(self.model)[1], args, kwargs)
            return self.outline_of(args, kwargs)
        finally:
            self.runs = None

    def settle(self) -> None:
        """Rewrite the fragments that were looked at, now that their weights are planned; or trace them once more."""
        if not all(piece.can_wait() for piece in self.pieces):
            self.forget()
        for piece in self.pieces:
            piece.settle()

    def forget(self) -> None:
        """Fragments that were looked at are not to run: the next call is traced anew."""
        if any(piece.looked_at for piece in self.pieces):
            self.pieces = [piece for piece in self.pieces if not piece.looked_at]
            self._entries.clear()

    def compile(self, gm: GraphModule, inputs: Sequence[Any], *, whole: bool = False) -> Callable[..., Any]:
        """The backend that TorchDynamo calls. whole: the caller knows that the fragment is all of a call."""
        refuse_rewritten(gm, self.model)
        self._refuse_shards(inputs)
        complete = self._called(gm)
        if complete is None:
            self.met_in_parts()
        fragment = LiveFragment(self, gm, whole or complete is self.model)
        fragment.variant(self.names_of(inputs))
        self.pieces.append(fragment)
        return fragment if self.prepared.bare else weakly(fragment)

    def _called(self, gm: GraphModule) -> nn.Module | None:
        """The module of whose call the fragment is all, or None: it is a part."""
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is None or reason.graph_break:
            return None
        code = frame_code()
        return next((module for module, _, known in self._entries.values() if known is code), None)

    # -- rewriting ---------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """All programs so far, numbered; one alone is shown without a number."""
        return next(iter(self.seen)) if len(self.seen) == 1 else super().text()

    def rewritten(self, program: GraphModule, *, whole: bool) -> GraphModule:
        """Plan what the program reads for the first time, and apply the passes. Raises `Undecided`."""
        prepared, bodies, read = self.prepared, list(programs(program)), names_read(program)
        prepared.growing.take_in(read)
        missing = prepared.growing.undecided(read)
        if not whole and not self.in_parts and (missing or not prepared.looked):
            raise Undecided(f"{', '.join(missing) or type(self.model).__name__}: read in part of a call")
        if missing:
            prepared.growing.decide(program, whole=whole)
        sites = [site for name, site in prepared.sites.items() if name in read]
        for site in sites:
            self._check(site.name, bodies)
        passes = pipeline(prepared.method, sites)
        for each in bodies:
            run(each, passes)
        self.seen.setdefault(program_text(program), program)
        return program

    def _check(self, name: str, bodies: Sequence[GraphModule]) -> None:
        """A later path has to use a planned weight as the first one did."""
        check_parameters(self.model, [name])
        site, shape = self.prepared.sites[name], tuple(self.model.get_parameter(name).shape)
        if shape != site.shape:
            raise NMError(
                f"{name} has shape {list(shape)} now, it was prepared with {list(site.shape)}: its state does not fit. "
                "nm.freeze the model before layers are replaced, then nm.compile it again"
            )
        for use in (use for each in bodies for node in reads(each, name) for use in uses(node)):
            if isinstance(use, Blocked) or use.layout != site.layout:
                how = use.reason if isinstance(use, Blocked) else "used along another axis"
                raise NMError(
                    f"{name} of shape {list(shape)} was planned as {site.pattern}, but another path has it {how}: "
                    f"leave it dense with exclude={name!r}"
                )

    def _refuse_shards(self, inputs: Sequence[Any]) -> None:
        """Raise NMError for a parameter that is in shards even in a call, as a tensor-parallel plan has it."""
        prepared = self.prepared
        for name, value in zip(self.names_of(inputs), inputs, strict=True):
            if name is not None and is_sharded(value):
                raise parallel(name, value, prepared.sites.get(name) or prepared.candidates.get(name))

    def note_outside(self, name: str, func: Any) -> None:
        """A planned weight, or one that may become planned, was read by Python outside fragments. Raises NMError.

        One that may become planned and meets no product here is an error at the end of the call, if no graph reads it.
        """
        if self.runs is not None and name not in self.prepared.sites:
            self.seen_outside(name, func)
            return
        if name in self.prepared.candidates and name not in self.computed_with:
            self.computed_with[name] = python_line()
        maybe = name in self.prepared.candidates and getattr(func, "__name__", "") in PRODUCTS
        if maybe or name in self.prepared.sites:
            check_compiled(self.model, name)
            raise NMError(outside_text(name, python_line(), captured=False))


def frame_code() -> Any:
    """The code object of the frame that TorchDynamo is compiling."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        return None


_OF_LOWERED = ("packed_linear", "packed_conv2d", "no_gradient", "cslt_linear", "cslt_linear_int8", "unfold_taps")
"""What `nm.lower` puts into a graph; all other ops of ``nm::`` come from `nm.compile`."""


def refuse_rewritten(gm: GraphModule, model: nn.Module) -> None:
    """Raise NMError for a graph that nm.compile has rewritten already. What a lowered part of it runs may stay."""
    for node in gm.graph.nodes:
        op = node.target if isinstance(node.target, torch._ops.OpOverload) else None
        if op is not None and op.namespace == "nm" and op.name().removeprefix("nm::") not in _OF_LOWERED:
            raise NMError(
                f"{type(model).__name__} was compiled by nm.compile already, its graph is sparse: "
                'torch.compile it with backend="inductor"'
            )


torch._dynamo.eval_frame.skip_code(entered.__code__)  # as a frame of its own it must stay Python
