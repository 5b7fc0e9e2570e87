"""Fragments of a live model: rewritten when TorchDynamo hands them over, compiled by inductor or run as they are.

    fragment ──lower──► aten ──decide──► plan ──passes──► program ──lift──► AOTAutograd / inductor

The first fragment that is a whole call plans the weights it reads. If the call comes in several, it is first run once to
be looked at (`Undecided`), as `nm.compile` does with example inputs: its fragments run dense, are planned on together, and
are then rewritten where they are, so that TorchDynamo traces the model's Python once.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.fx.experimental.symbolic_shapes import has_free_symbols
from torch.utils import _pytree as pytree

from nm_compiler.capture.bodies import program_text, programs
from nm_compiler.capture.routes import way_back
from nm_compiler.errors import NMError
from nm_compiler.fragments.aten import bind_inputs, lower
from nm_compiler.fragments.dynamo import Fragments, Variant, entry_of, store_of, weakly
from nm_compiler.fragments.outline import Run
from nm_compiler.fragments.watching import PRODUCTS, outside_text, python_line, unwatched
from nm_compiler.graph import reads, run
from nm_compiler.live.entries import entered
from nm_compiler.live.growing import check_parameters
from nm_compiler.live.lifting import Lifted, form_of, lift
from nm_compiler.recipe import pipeline
from nm_compiler.sites.uses import Blocked, uses
from nm_compiler.state.sharding import is_sharded, parallel

if TYPE_CHECKING:
    from nm_compiler.live.prepared import Prepared


class Undecided(NMError):
    """A fragment reads weights that no plan is there for, and it is not the whole call."""


class Broken(NMError):
    """A call that nobody watches comes in parts: what runs between them has to be watched."""


class Live(Fragments):
    """The fragments of a `Prepared` model, all modes and modules together."""

    follows_hooks = True

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.origin, {})
        self.prepared = prepared
        self.at_once = False  # whether the caller knows that the next fragment is a whole call
        self.parts = False  # whether a fragment that is not a whole call may be planned on
        self.pieces: list[LiveFragment] = []
        self.computed_with: dict[str, str] = {}  # weights that no graph had read and Python computed with, and its line
        self.ran = False  # whether a fragment has run in this call
        self.parted = False  # whether this call is known to come in parts, as Python calls a layer of it
        self._watched: set[int] = set()
        self._tried: set[tuple[int, bool, bool]] = set()
        self._watching = False
        self._trying = False  # whether a call runs that nobody watches, in the hope that it is one fragment
        self._entries: dict[int, tuple[nn.Module, Callable[..., Any], Any]] = {}

    # -- running -----------------------------------------------------------------------------------------------------

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run ``module``, the model or a part of it, compiled."""
        known = self._entry(module)
        if id(module) not in self._watched:
            self.ran = self._watching = self.parted = False
            mode = id(module), module.training, torch.is_grad_enabled()
            back = way_back(self.model) if mode not in self._tried else None  # it costs too much for every call
            self._tried.add(mode)
            broken = False
            self._trying = True
            try:
                result = self.guarded(known[1], args, kwargs, watched=False)
                if self.ran and not self.parted:  # one fragment, and nothing outside it
                    return result
            except Broken:
                broken = True
            finally:
                self._trying = False
            if back is not None:  # Python between fragments has run, and runs again
                back()
            self._watched.add(id(module))
            self._entries.pop(id(module), None)
            known = self._entry(module)
            if broken and not self.prepared.looked and not self.parts:  # its first fragment would say so, traced once more
                raise Undecided(type(self.model).__name__)
        self._watching = True
        return self.guarded(known[1], args, kwargs)

    def _entry(self, module: nn.Module) -> tuple[nn.Module, Callable[..., Any], Any]:
        known = self._entries.get(id(module))
        if known is None:
            known = (module, *entry_of(module, self, breaks=id(module) in self._watched))
            self._entries[id(module)] = known
        return known

    def met_in_python(self) -> None:
        """A layer is called by Python, so the call has come in parts. Raises `Broken` if nobody watches it."""
        if self._trying:
            self.parted = True  # should the model catch what is raised
            raise Broken(type(self.model).__name__)

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphModule:
        """Run the model once, dense, and return the outline of what ran. `settle` or `forget` has to follow."""
        self.runs, self._watching = [], True
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

    def compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend that TorchDynamo calls."""
        refuse_rewritten(gm, self.model)
        self._refuse_shards(inputs)
        complete = self._called(gm)
        if complete is None and not self._watching and not self.prepared.bare:
            raise Broken(type(self.model).__name__)
        fragment = LiveFragment(self, gm, complete is self.model or self.at_once)
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
        prepared, bodies = self.prepared, list(programs(program))
        read = {str(node.target) for each in bodies for node in each.graph.nodes if node.op == "get_attr"}
        prepared.growing.take_in(read)
        missing = prepared.growing.undecided(read)
        if not whole and not self.parts and (missing or not prepared.looked):
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
            raise NMError(outside_text(name, python_line(), captured=False))


class LiveFragment:
    """What runs in place of one Dynamo graph: equal layers share it, so it has a variant for each set of weights."""

    def __init__(self, live: Live, gm: GraphModule, whole: bool) -> None:
        self._live, self.whole = weakref.ref(live), whole
        self.examples = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        self.lowered = lower(gm)
        self.variants: dict[tuple[str | None, ...], Variant] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @property
    def live(self) -> Live:
        """The carrier of the fragment."""
        live = self._live()
        assert live is not None
        return live

    @property
    def looked_at(self) -> bool:
        """Whether something in it is dense still, which only a look may run."""
        return any(not isinstance(variant, LiveVariant) for variant in self.variants.values())

    def variant(self, names: tuple[str | None, ...]) -> Variant:
        """The fragment over the weights ``names``; compiled when it is new, or dense while the call is only looked at."""
        if names not in self.variants:
            live = self.live
            program = bind_inputs(self.lowered, names, live.model)
            if live.runs is None:
                self.variants[names] = LiveVariant(self, live.rewritten(program, whole=self.whole), names)
            else:
                self.variants[names] = Variant(program, names, live.model)
        return self.variants[names]

    def for_another(self, live: Live | None) -> LiveFragment:
        """The same for another model of its class; what was compiled is for both. None: for who makes those later."""
        twin = copy.copy(self)
        twin._live, twin.variants = weakref.ref(self.live if live is None else live), {}
        return twin

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether it has run with the parameters among ``args``."""
        return any(variant.fits(args) for variant in self.variants.values())

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether all parameters among ``args`` are those of its model."""
        names = self.live.names_of(args)
        return not any(name is None and isinstance(value, nn.Parameter) for name, value in zip(names, args, strict=True))

    def can_wait(self) -> bool:
        """Whether it may be compiled later than TorchDynamo's guards: with fixed sizes a compiler adds none to them."""
        return self.live.prepared.then == "eager" or not self.looked_at or is_fixed(self.lowered)

    def settle(self) -> None:
        """Rewrite what was dense while the call was looked at."""
        for names, variant in self.variants.items():
            if not isinstance(variant, LiveVariant):
                program = self.live.rewritten(variant.program, whole=self.whole)
                self.variants[names] = LiveVariant(self, program, names, later=True)

    def compiled(self, lifted: Lifted, inputs: Sequence[Any]) -> Callable[..., Any] | None:
        """The lifted program compiled, once for all variants of the same form. None for one that is new at run time."""
        form = form_of(lifted.gm)
        if form not in self._compiled:
            if torch._guards.TracingContext.try_get() is None:
                return None
            self._compiled[form] = compile_lifted(lifted, self.live.model, inputs, self.live.prepared.then)
        return self._compiled[form]

    def compiled_now(self, lifted: Lifted, inputs: Sequence[Any]) -> Callable[..., Any] | None:
        """The same at run time, of a fragment that was looked at: sizes are fixed and modes are those it was traced in."""
        mode = torch._guards.detect_fake_mode(self.examples) or torch._subclasses.FakeTensorMode()
        context = torch._guards.TracingContext(mode)
        with torch._guards.tracing(context):
            made = self.compiled(lifted, inputs)
        guards = context.guards_context.aotautograd_guards
        return None if guards else made  # TorchDynamo would have had to check those, of inputs that lie in one memory

    def __call__(self, *args: Any) -> Any:
        live = self.live
        live.ran = True
        with unwatched():
            found = next((variant for variant in self.variants.values() if variant.fits(args)), None)
            found = found or self.variant(live.names_of(args))
            if live.runs is None:
                assert isinstance(found, LiveVariant), "a fragment that was looked at runs dense"
                return found.run(args)
            inputs = tuple(args[index] for index in found.kept)
            outputs = found.program(*inputs)
            live.runs.append(Run(bind_inputs(self.lowered, found.names, live.model), inputs, tuple(outputs)))
            return outputs


class LiveVariant(Variant):
    """A fragment bound to certain weights, and what runs it. later: it is compiled when it first runs."""

    def __init__(
        self, fragment: LiveFragment, program: GraphModule, names: Sequence[str | None], *, later: bool = False
    ) -> None:
        live = fragment.live
        super().__init__(program, names, live.model)
        read = {str(node.target) for each in programs(program) for node in each.graph.nodes if node.op == "get_attr"}
        self.planned = tuple(name for name in live.prepared.sites if name in read)
        self.calls = 0
        self._fast: Callable[..., Any] | None = None
        self._waits: Callable[[], Callable[..., Any] | None] | None = None
        if live.prepared.then != "eager":
            lifted, examples = lift(program), [fragment.examples[index] for index in self.kept]
            self._stores = [_getter(live.model, read) for read in lifted.reads]
            if later:
                self._waits = functools.partial(fragment.compiled_now, lifted, examples)
            else:
                self._fast = fragment.compiled(lifted, examples)

    def run(self, args: Sequence[Any]) -> Any:
        """Run on the fragment's inputs."""
        self.calls += 1
        if self._waits is not None:
            self._fast, self._waits = self._waits(), None
        inputs = [args[index] for index in self.kept]
        if self._fast is None:
            return self.program(*inputs)
        return self._fast(*[store[leaf] for store, leaf in self._stores], *inputs)


def is_fixed(lowered: GraphModule) -> bool:
    """Whether no size in a graph is a symbol."""
    values = (node.meta.get("val") for node in lowered.graph.nodes)
    leaves = (leaf for value in values for leaf in pytree.tree_leaves(value))
    return not any(isinstance(leaf, (Tensor, *py_sym_types)) and has_free_symbols(leaf) for leaf in leaves)


def _getter(model: nn.Module, read: Any) -> tuple[Any, Any]:
    """Where the value of a read is looked up at every call: a module's own dict, or a list of one constant."""
    return ([read.constant], 0) if read.constant is not None else store_of(model, read.name)


def compile_lifted(lifted: Lifted, model: nn.Module, inputs: Sequence[Any], then: str) -> Callable[..., Any]:
    """Hand a lifted graph to the compiler ``then``, inside the tracing context of its fragment."""
    from torch._dynamo.backends.registry import lookup_backend

    context = torch._guards.TracingContext.try_get()
    mode: Any = context.fake_mode if context is not None else None
    states = []
    for read in lifted.reads:
        store, leaf = _getter(model, read)
        value: Tensor = store[leaf]
        states.append(value if mode is None else mode.from_tensor(value, static_shapes=True))
    backend: Any = lookup_backend(then)
    if then == "inductor":
        from nm_compiler.live.inductor import compiled

        return compiled(backend, lifted.gm, [*states, *inputs])
    made: Callable[..., Any] = backend(lifted.gm, [*states, *inputs])
    return made


def frame_code() -> Any:
    """The code object of the frame that TorchDynamo is compiling."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        return None


def refuse_rewritten(gm: GraphModule, model: nn.Module) -> None:
    """Raise NMError for a graph that nm.compile has rewritten already."""
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "nm":
            raise NMError(
                f"{type(model).__name__} was compiled by nm.compile already, its graph is sparse: "
                'torch.compile it with backend="inductor"'
            )


torch._dynamo.eval_frame.skip_code(entered.__code__)  # as a frame of its own it must stay Python
