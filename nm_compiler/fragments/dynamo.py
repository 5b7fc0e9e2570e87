"""The second way to carry a mode: TorchDynamo runs the model's Python and hands over fragments, which the passes rewrite.

    forward ──TorchDynamo──► fragment, Python, fragment, ...     fragment ──lower──► aten ──passes──► program, run as it is

For models whose control flow depends on data. A branch that is taken for the first time is compiled and rewritten then.
Nothing runs dense in silence: the recompile limit raises, and so does a planned weight that Python reads outside fragments.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.capture import records
from nm_compiler.capture.bodies import program_text, programs
from nm_compiler.capture.counted import counts
from nm_compiler.capture.exported import copied
from nm_compiler.errors import NMError
from nm_compiler.fragments.aten import bind_inputs, names_by_id, to_aten
from nm_compiler.fragments.dynamo_errors import check_around, explained, of_the_op, own_fault
from nm_compiler.fragments.outline import How, Outside, Run, edges, multiplied, outline
from nm_compiler.fragments.silence import expected
from nm_compiler.fragments.watching import PRODUCTS, Watch, outside_text, python_line, unwatched
from nm_compiler.fragments.ways_in import ways_in
from nm_compiler.graph import Pass, reads, run
from nm_compiler.sites.plan import UNREAD, Plan
from nm_compiler.sites.uses import Use, uses

_log = logging.getLogger(__name__)

_LATE = "first used after nm.compile, on a path that the example inputs did not take: give inputs that take it"
_LIMIT = 64  # versions of one function: layers that share their code need one each; Dynamo's own limit is 8


class OwnFault(NMError):
    """An op of the model itself fails on the inputs it was given."""


class Fragments:
    """One mode of a model, in fragments. Before `rewrite` it runs them dense and can `record` them.

    hidden: keyword inputs that every call gets unless it brings its own (``use_cache=False``).
    """

    follows_hooks = False
    """Whether layers may get and lose hooks later; a captured model says no (`SparseModule`)."""

    def __init__(self, model: nn.Module, hidden: Mapping[str, Any]) -> None:
        self.model, self.hidden = model, dict(hidden)
        self.seen: dict[str, GraphModule] = {}
        self.late: dict[str, str] = {}
        self.planned: frozenset[str] = frozenset()
        self.unread: frozenset[str] = frozenset()
        self.passes: list[Pass] | None = None
        self.runs: list[Run | Outside] | None = None
        self.outlined: GraphModule | None = None
        self.outside: dict[str, str] = {}
        self.edges: frozenset[str] = frozenset()
        self.counts = counts(model)
        self._fragments: list[_Fragment] = []
        self._names: dict[int, str] = {}
        self._compiled: Callable[..., Any] | None = None

    # -- running -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model. Raises NMError where a weight would be dense, and what the model itself raises."""
        if self._compiled is None:
            self._compiled, _ = entry_of(self.model, self)
        with ways_in(self.model):
            return self.guarded(self._compiled, args, {**self.hidden, **kwargs})

    def guarded(
        self, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, watched: bool = True
    ) -> Any:
        """Call what `entry_of` gave, with errors instead of TorchDynamo's dense ways out. watched: see `Watch`."""
        check_around(self.model)
        try:
            with expected(), torch._dynamo.config.patch(_settings(self)), Watch(self) if watched else contextlib.nullcontext():
                return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchRuntimeError as error:  # an op of the model itself fails on these inputs
            inner = of_the_op(error)
            raise OwnFault(own_fault(self.model, args, kwargs, error, inner)) from inner
        except torch._dynamo.exc.BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, NMError):
                raise inner from None
            raise NMError(explained(self.model, inner, _settings(self)["recompile_limit"])) from error
        except (torch._dynamo.exc.FailOnRecompileLimitHit, torch._dynamo.exc.TorchDynamoException) as error:
            raise NMError(explained(self.model, error, _settings(self)["recompile_limit"])) from error

    def compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A Dynamo fragment becomes what runs in its place. This is the backend that Dynamo calls."""
        fragment = _Fragment(self, to_aten(gm))
        fragment.variant(self.names_of(inputs))
        self._fragments.append(fragment)
        return weakly(fragment)

    def names_of(self, inputs: Sequence[Any]) -> tuple[str | None, ...]:
        """Which of ``inputs`` are the model's state now."""
        self._names = names_by_id(self.model)
        return tuple(self._names.get(id(value)) if isinstance(value, Tensor) else None for value in inputs)

    # -- copying -----------------------------------------------------------------------------------------------------

    def copied(self, model: nn.Module, memo: dict[int, Any]) -> Fragments:
        """The same over a copy of the model; its fragments are compiled again when they run."""
        return self._twin(model, [copied(program, model, memo) for program in self.seen.values()])

    def packed(self) -> dict[str, Any]:
        """Plain values: the programs so far, for show, report and freeze. What runs is compiled again."""
        kept = {key: self.__dict__[key] for key in ("hidden", "planned", "unread", "late")}
        return {**kept, "seen": [records.pack(program) for program in self.seen.values()]}

    @classmethod
    def unpacked(cls, packed: dict[str, Any], model: nn.Module, passes: Sequence[Pass]) -> Fragments:
        """The inverse of `packed`."""
        carrier = cls(model, packed["hidden"])
        carrier.__dict__.update({key: packed[key] for key in ("planned", "unread", "late")}, passes=list(passes))
        return carrier._twin(model, [records.unpack(program, model) for program in packed["seen"]])

    def _twin(self, model: nn.Module, seen: Iterable[GraphModule]) -> Fragments:
        twin = Fragments(model, self.hidden)
        twin.__dict__.update({key: self.__dict__[key] for key in ("planned", "unread", "passes")}, late=dict(self.late))
        twin.seen = {program_text(program): program for program in seen}
        return twin

    # -- rewriting ---------------------------------------------------------------------------------------------------

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the example once and keep what ran as one outline. The caller puts the model's state back."""
        self.runs = []
        try:
            self(args, kwargs)
            self.outlined = self.outline_of(args, kwargs)
        finally:
            self.runs = None

    def outline_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphModule:
        """What ran as one graph; what Python multiplied is in ``outside``, and what of that is an end in ``edges``."""
        assert self.runs is not None
        outlined = outline(self.model, self.runs, (args, kwargs))
        self.outside, self.edges = multiplied(self.model, self.runs), edges(outlined)
        return outlined

    def seen_outside(self, name: str, func: Any) -> None:
        """Keep, in its place among the runs, that Python computes with a weight."""
        assert self.runs is not None
        called = getattr(func, "__name__", "")
        how = How.PRODUCT if called in PRODUCTS else How.LOOKUP if called.startswith("embedding") else How.OTHER
        last = self.runs[-1] if self.runs else None
        if isinstance(last, Outside) and last.name == name:  # slice by slice, say
            if last.how >= how:
                return
            self.runs.pop()
        if self.model.get_parameter(name).ndim >= 2:
            self.runs.append(Outside(name, python_line(), how))

    @property
    def whole(self) -> GraphModule:
        """The outline of the recorded run, which weights are planned on."""
        assert self.outlined is not None
        return self.outlined

    def text(self) -> str:
        """All programs so far, numbered."""
        count = len(self.seen)
        return "\n\n".join(f"# fragment {number} of {count}\n{text}" for number, text in enumerate(self.seen, 1))

    def rewrite(self, passes: Sequence[Pass], plan: Plan) -> None:
        """Apply ``passes`` to all fragments there are and to all that come."""
        self.passes, self.planned = list(passes), frozenset(site.name for site in plan.sites)
        self.unread = frozenset(refusal.where for refusal in plan.refusals if refusal.reason == UNREAD)
        self.outlined = None
        for fragment in self._fragments:
            for variant in fragment.variants.values():
                variant.program = self.adopt(variant.program)

    def adopt(self, program: GraphModule) -> GraphModule:
        """Rewrite a new program once the plan is there; the passes refuse to leave a planned weight dense (`check_masked`)."""
        if self.passes is None:
            return program
        for each in programs(program):
            self._note_late(each)
            run(each, self.passes)
        self.seen[program_text(program)] = program
        return program

    def _note_late(self, program: GraphModule) -> None:
        for name in self.unread:
            if any(isinstance(use, Use) for read in reads(program, name) for use in uses(read)):
                self._tell(name)

    def _tell(self, name: str) -> None:
        if name not in self.late:
            self.late[name] = _LATE
            _log.warning("%s stays dense: %s", name, _LATE)

    def note_outside(self, name: str, func: Any) -> None:
        """A parameter was read by Python outside fragments. Raises NMError if it is planned."""
        if name in self.planned:
            raise NMError(outside_text(name, python_line()))
        if self.runs is not None:
            self.seen_outside(name, func)
        elif name in self.unread and getattr(func, "__name__", "") in PRODUCTS:
            self._tell(name)

    def name_of(self, parameter: Tensor) -> str | None:
        """The full name of a parameter of the model, or None."""
        name = self._names.get(id(parameter))
        if name is None:
            self._names = names_by_id(self.model)
            name = self._names.get(id(parameter))
        return name


class Variant:
    """A fragment bound to certain parameters and buffers."""

    def __init__(self, program: GraphModule, names: Sequence[str | None], model: nn.Module) -> None:
        self.program, self.names = program, tuple(names)
        self.kept = [index for index, name in enumerate(names) if name is None]
        self.state = [(index, *store_of(model, name)) for index, name in enumerate(names) if name is not None]

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether ``args`` bring the very parameters and buffers that the program reads by name."""
        return all(store.get(leaf) is args[index] for index, store, leaf in self.state) and not any(
            isinstance(args[index], nn.Parameter) for index in self.kept
        )


class _Fragment:
    """What runs in place of one Dynamo graph: equal layers share it, so it has a variant for each set of weights."""

    def __init__(self, carrier: Fragments, lowered: GraphModule) -> None:
        self.carrier, self.lowered = carrier, lowered
        self.variants: dict[tuple[str | None, ...], Variant] = {}

    def variant(self, names: tuple[str | None, ...]) -> Variant:
        if names not in self.variants:
            program = self.carrier.adopt(bind_inputs(self.lowered, names, self.carrier.model))
            self.variants[names] = Variant(program, names, self.carrier.model)
        return self.variants[names]

    def __call__(self, *args: Any) -> Any:
        found = next((variant for variant in self.variants.values() if variant.fits(args)), None)
        found = found or self.variant(self.carrier.names_of(args))
        inputs = [args[index] for index in found.kept]
        with unwatched():
            outputs = found.program(*inputs)
        if self.carrier.runs is not None:
            self.carrier.runs.append(Run(found.program, tuple(inputs), tuple(outputs)))
        return outputs


def _settings(carrier: Fragments) -> dict[str, Any]:
    """Dynamo's own settings while a carrier runs, the user's otherwise."""
    return {
        "fail_on_recompile_limit_hit": True,  # not: go on with the dense code
        "suppress_errors": False,  # nor this
        "allow_unspec_int_on_nn_module": carrier.counts,  # else each value that a counter takes is compiled
        "recompile_limit": max(_LIMIT, torch._dynamo.config.recompile_limit),
        "optimize_ddp": False,  # it splits fragments and hands them over with fake inputs
        "skip_nnmodule_hook_guards": not carrier.follows_hooks,
        "allow_empty_graphs": True,  # else a function whose first call has no ops stays Python for good
    }


def entry_of(module: nn.Module, carrier: Fragments, *, breaks: bool = False) -> tuple[Callable[..., Any], CodeType]:
    """A module's call under TorchDynamo, and the code object of its frame.

    It has the carrier's own cache where torch has such a thing (2.12 on). The entry of `Module.compile` is passed by.
    breaks: the call is known to come in parts, so TorchDynamo need not trace all of it once more to find that out.
    """
    backend = weakref.WeakMethod(carrier.compile)

    def compile_fragment(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        own = backend()
        assert own is not None
        return own(gm, inputs)

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # Dynamo caches by code object, counts versions by it before 2.12, and by name and line remembers which sizes changed
    call.__code__ = call.__code__.replace(co_name=f"call_{type(module).__name__}_{id(module):x}")
    if breaks:
        torch._dynamo.eval_frame.skip_code(call.__code__)
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    with torch._dynamo.config.patch(suppress_errors=False):  # torch refuses it beside what `_settings` has, and by name leaves
        entry: Callable[..., Any] = torch.compile(call, backend=compile_fragment, **apart)  # type: ignore[call-overload]
    return entry, call.__code__


def weakly(fragment: Any) -> Callable[..., Any]:
    """Dynamo's cache lives as long as the user's code: it must not keep the model alive."""
    reference = weakref.ref(fragment)

    def run_fragment(*args: Any) -> Any:
        own = reference()
        assert own is not None
        return own(*args)

    return run_fragment


def store_of(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a parameter or buffer now, and its key there."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf
