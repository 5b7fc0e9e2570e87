"""What runs in place of a fragment of a live model: a variant for each set of weights, compiled once for all of one form.

lowered ──bind──► variant, dense          while a call is only looked at
        ──bind, passes──► program ──lift──► compiled by inductor or AOTAutograd, or run as it is
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.fx.experimental.symbolic_shapes import has_free_symbols
from torch.utils import _pytree as pytree

from nm_compiler.capture.bodies import names_read
from nm_compiler.fragments.aten import bind_inputs, to_aten
from nm_compiler.fragments.dynamo import Variant, store_of
from nm_compiler.fragments.outline import Run
from nm_compiler.fragments.watching import unwatched
from nm_compiler.live.lifting import Lifted, form_of, lift

if TYPE_CHECKING:
    from nm_compiler.live.live import Live


class LiveFragment:
    """What runs in place of one Dynamo graph: equal layers share it, so it has a variant for each set of weights."""

    def __init__(self, live: Live, gm: GraphModule, whole: bool) -> None:
        self._live, self.whole = weakref.ref(live), whole
        self.examples = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        self.lowered = to_aten(gm)
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
        if live.attempt is not None:
            live.attempt.ran = True
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
        read = names_read(program)
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
