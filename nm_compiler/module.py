"""SparseModule: the rewritten model, run over the original's own children and parameters, in each mode by a carrier."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Proxy

from nm_compiler.absent import TELLING, absent
from nm_compiler.alone import unwatch, watch
from nm_compiler.capture import records
from nm_compiler.capture.bodies import programs
from nm_compiler.capture.exported import Exported, moved
from nm_compiler.capture.ranks import asked
from nm_compiler.errors import NMError
from nm_compiler.evaluate import effective_weights
from nm_compiler.graph import Pass
from nm_compiler.links import Layers, has_modes
from nm_compiler.methods.base import Method, state_of
from nm_compiler.recipe import pipeline
from nm_compiler.sites.plan import Plan
from nm_compiler.state.attaching import detach_state, recipe_tag, state_names
from nm_compiler.state.averaged import Copied, checked_copy, copied, loaded
from nm_compiler.state.beside import RECIPE, Weight, check_there, read_recipe
from nm_compiler.state.chosen import counted
from nm_compiler.state.loading import check_values, compare, start_afresh

if TYPE_CHECKING:
    from nm_compiler.fragments.dynamo import Fragments

_SHARED = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_KEPT = ("plan", "method", "seed", "notes", "alone", "frozen")


class SparseModule(nn.Module):
    """A model that trains with N:M weights.

    It shares the model's ``_parameters``, ``_buffers`` and ``_modules``, so names, ``state_dict``, ``.to()``, hooks of
    DDP and so on are the model's own plus the state beside the weights. ``forward`` runs one rewritten graph per mode,
    or, in a mode that export cannot take, rewritten fragments. Made by `nm_compiler.compile`.

    plan: which weights are N:M, and why the others are not; method: as given; origin: the model itself; notes: for the report;
    alone: lines of it that asked for other processes at capture, when there were none;
    routes: what runs each mode. The rest is as of every `nm_compiler.carrier.Carrier`.
    """

    origin: nn.Module
    routes: dict[bool, Exported | Fragments]
    plan: Plan
    method: Method
    seed: int
    notes: tuple[str, ...]
    alone: tuple[str, ...]
    frozen: bool
    loads: int
    progress: tuple[int, int] | None
    made_of: Mapping[str, int] | None
    copy_known: Copied | None

    def __init__(
        self,
        model: nn.Module,
        routes: Mapping[bool, Exported | Fragments],
        plan: Plan,
        method: Method,
        seed: int,
        notes: tuple[str, ...] = (),
        alone: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.__dict__.update(plan=plan, method=method, seed=seed, notes=notes, alone=alone, frozen=False)
        self._attach(model, routes)
        self._note(made_of=counted(self.weights))

    def _attach(self, model: nn.Module, routes: Mapping[bool, Exported | Fragments]) -> None:
        for name in _SHARED:
            self.__dict__[name] = getattr(model, name)
        self._note(origin=model, routes=dict(routes), training=model.training, loads=0)
        self._note(progress=None, copy_known=None, made_of=None)
        if not self.frozen:
            parts = not all(isinstance(route, Exported) for route in routes.values())
            watch(model, [site.name for site in self.plan.sites], parts=parts)
        below = [(place, module) for place, module in enumerate(model.modules()) if place and has_modes(module)]
        self._note(_layers=Layers(model), _below=below, forward=MethodType(_own_code(type(self).forward), self))

    def _note(self, **attributes: Any) -> None:
        """Set attributes of its own, past `nn.Module`: a child of the model, which is a child here too, may have the name."""
        self.__dict__.update(attributes)

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode. Raises NMError for a call that does not fit what was captured."""
        if self.frozen:
            raise NMError("this model was frozen: use what nm.freeze returned, the plain model with zeros in its weights")
        if isinstance(args, Proxy) or any(isinstance(value, Proxy) for value in args):  # torch.fx gives a root all in one
            self._refuse_symbols()
        if self.alone:
            self._refuse_company()
        route = self.routes[self.training]
        eager = not torch.compiler.is_compiling()
        if eager:
            self._layers.check(exported=isinstance(route, Exported), training=self.training)
            if self.copy_known is not None and not (self.training and torch.is_grad_enabled()):
                self._note(copy_known=checked_copy(self, self.copy_known))
        if not isinstance(route, Exported):  # fragments follow the mode of every layer by themselves
            return route(args, kwargs)
        for place, module in self._below:
            if module.training is not route.signature.modes[place]:
                self._refuse_mode(module)
        return route(args, kwargs, eager=eager and not hasattr(type(self), "reshard"))  # fully_shard has it

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _refuse_company(self) -> None:
        problem = asked(self.alone)
        if problem is not None:
            raise problem

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _refuse_symbols(self) -> None:
        raise NMError(
            f"torch.fx cannot trace this {type(self.origin).__name__}: nm.compile has made it a graph. What traces, as "
            "create_feature_extractor or prepare_fx do, comes before nm.compile, or takes what nm.freeze returns"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """For torch.jit.script, also of what this is part of. Raises NMError."""
        raise NMError(
            f"torch.jit.script reads Python, and this {type(self.origin).__name__} is a graph: script what nm.freeze returns, "
            "or record a call of this one with torch.jit.trace"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _refuse_mode(self, module: nn.Module) -> None:
        """Raises. Not traced: a compiled call leaves its graph here, to raise as the eager one does."""
        name = next(name for name, m in self.origin.named_modules() if m is module)
        now, then = ("training", "evaluation") if module.training else ("evaluation", "training")
        raise NMError(
            f"{name} ({type(module).__name__}) is in {now} mode, but was captured in {then} mode: "
            "switch the whole model with train() and eval(), or set that mode in the model's own train()"
        )

    def train(self, mode: bool = True) -> SparseModule:
        """Switch the mode as the model's own ``train`` does, so deliberately frozen layers stay frozen."""
        self.origin.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for training in (False, True):
            for gm in self._tops(training):
                moved(gm, fn)
        return self

    def to_empty(self, *, device: Any, recurse: bool = True) -> SparseModule:
        """As `nn.Module.to_empty`, for a model compiled on the meta device: state and constants are made afresh.

        Load a state_dict next, dense or not. Raises NMError if the graphs hold constants of the model that never had values.
        """
        tables = self.method.constants(self.plan.sites)
        lost = [
            name
            for gm in self.programs()
            for name, value in gm.__dict__["extras"].items()
            if isinstance(value, Tensor) and value.is_meta and name not in tables
        ]
        if lost:
            raise NMError(f"{lost[0]} is a constant made in forward() that never had values: compile after model.to_empty()")
        super().to_empty(device=device, recurse=recurse)
        for gm in self.programs():
            for name in tables.keys() & gm.__dict__["extras"].keys():
                gm.__dict__["extras"][name] = gm.__dict__[name] = tables[name].to(device)
        with torch.no_grad():
            self._buffers[RECIPE] = recipe_tag(self.origin, self.plan, self.method)
            for weight in self.weights:
                for suffix, value in state_of(self.method, weight.site, weight.param.detach()).items():
                    weight[suffix].copy_(value)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute that the model has is the model's: the next call says if a graph holds another value of it."""
        origin = self.__dict__.get("origin")
        if origin is not None and name in origin.__dict__ and name not in self.__dict__:
            setattr(origin, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Plain attributes of the model (``config``), and methods that name parameters; its others would run dense weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get("origin")
            if origin is None or name.startswith("__") or not hasattr(origin, name):
                raise
        value = getattr(origin, name)
        if callable(value) and not isinstance(value, (nn.Module, Tensor)) and name not in TELLING:
            raise absent(origin, name)
        return value

    def __getitem__(self, key: Any) -> Any:
        """A layer of a model that is indexed, as `nn.Sequential` is; its weight is dense, its mask beside it."""
        found = self._own("__getitem__")(key)
        if found is not None and isinstance(key, slice):
            raise NMError(
                f"a slice of this {type(self.origin).__name__} would be a model of its own, of dense layers: slice it before "
                "nm.compile, or slice what nm.freeze returns"
            )
        return found

    def __len__(self) -> int:
        return int(self._own("__len__")())

    def __iter__(self) -> Iterator[Any]:
        raise NMError(
            f"a loop over this {type(self.origin).__name__} would give its layers, which run dense by themselves: call the "
            "whole, or loop over what nm.freeze returns; .children() gives them to look at"
        )

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Hugging Face's Trainer may pass ``num_items_in_batch``: a graph takes it where the example had it."""
        route = self.routes[True]
        if isinstance(route, Exported):
            return "num_items_in_batch" in route.signature.kwarg_names
        own = getattr(self.origin, "accepts_loss_kwargs", None)
        kinds = (each.kind for each in inspect.signature(self.origin.forward).parameters.values())
        return inspect.Parameter.VAR_KEYWORD in kinds if own is None else bool(own)

    def __bool__(self) -> bool:
        return True

    def _own(self, name: str) -> Callable[..., Any]:
        found = getattr(self.origin, name, None)
        if found is None:
            raise TypeError(
                f"this {type(self.origin).__name__} has no {name}: its layers are attributes, as in the model itself"
            )
        own: Callable[..., Any] = found
        return own

    # -- the plan ----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> list[Weight]:
        """The planned weights, in the model's order."""
        return [Weight(site, self.origin) for site in self.plan.sites]

    def graph(self, training: bool | None = None) -> GraphModule:
        """The rewritten graph of a mode; of the current one by default. Raises NMError if it runs in fragments."""
        mode = self.training if training is None else training
        route = self.routes[mode]
        if isinstance(route, Exported):
            return route.gm
        raise NMError(f"{'training' if mode else 'evaluation'} mode runs in fragments: there is no one graph; see programs()")

    def _tops(self, training: bool) -> list[GraphModule]:
        route = self.routes[training]
        return [route.gm] if isinstance(route, Exported) else list(route.seen.values())

    def programs(self, training: bool | None = None) -> list[GraphModule]:
        """All rewritten graphs of a mode, or of both: the exported one, or the fragments so far, and bodies in them."""
        modes = (False, True) if training is None else (training,)
        return [each for mode in modes for gm in self._tops(mode) for each in programs(gm)]

    @property
    def late(self) -> dict[str, str]:
        """Weights that stay dense because only fragments that came after planning read them, and why."""
        routes = [route for route in self.routes.values() if not isinstance(route, Exported)]
        return {name: reason for route in routes for name, reason in route.late.items()}

    def masked(self, name: str) -> tuple[Tensor, Tensor | None]:
        """What the planned weight ``name`` is multiplied with now: forward, and backward under Bi-Mask."""
        for gm in self.programs():
            forward, backward = effective_weights(gm, name)
            if forward is not None:
                return forward, backward
        raise AssertionError(f"{name} is planned but no graph masks it")

    def masked_parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by name, planned weights as their masks leave them; what `verify` looks at."""
        check_there([] if self.frozen else self.weights)
        state, planned = set(self.state_names()), {site.name for site in self.plan.sites}
        own = {name: p.detach() for name, p in self.named_parameters() if name not in state}
        return {name: self.masked(name)[0] if name in planned and not self.frozen else p for name, p in own.items()}

    def state_names(self) -> list[str]:
        """The names of everything that was registered on the model."""
        return state_names(self.plan, self.method)

    def ready(self) -> list[Weight]:
        """All planned weights: both graphs are known."""
        return self.weights

    def runs(self, name: str) -> None:
        """Not counted: a graph that was captured is sparse at every call."""

    def text(self, training: bool) -> str:
        """The rewritten graph of a mode as a program."""
        text: str = self.routes[training].text()
        return text

    def retire(self) -> None:
        """The masks are in the weights now: take the state off the model."""
        detach_state(self.origin, self.plan, self.method)
        unwatch(self.origin)
        self._note(frozen=True)

    # -- loading -----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; a dense state_dict fits too and starts the state afresh.

        Raises NMError, nothing loaded, for another method, layout or pattern, for damaged state, and for wrong shapes.
        """
        if self.frozen:
            raise NMError("this model was frozen: load into what nm.freeze returned, the plain model")
        for name, value in self.state_dict().items():
            given = state_dict.get(name, value)
            if name != RECIPE and isinstance(given, Tensor) and given.shape != value.shape and name not in self.state_names():
                raise NMError(
                    f"{name} has shape {list(given.shape)} in this state_dict and {list(value.shape)} in the model: "
                    "it belongs to another architecture; nothing was loaded"
                )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Check the state below ``prefix`` before any of it is written. Also called where this module is nested."""
        tag, own = state_dict.get(prefix + RECIPE), self._buffers[RECIPE]
        assert own is not None
        if tag is None:
            start_afresh(self, state_dict, prefix)
        else:
            compare(self, read_recipe(tag), read_recipe(own))
            check_values(self, state_dict, prefix)
            self._note(copy_known=loaded(self))
        state_dict[prefix + RECIPE] = own
        self._note(loads=self.loads + 1)
        self.origin._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.origin._save_to_state_dict(destination, prefix, keep_vars)  # with the model's own extra state and overrides

    # -- copying -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        model = copy.deepcopy(self.origin, memo)
        twin.__dict__.update({key: self.__dict__[key] for key in _KEPT})
        twin._attach(model, {mode: route.copied(model, memo) for mode, route in self.routes.items()})
        twin._note(progress=self.progress)
        twin._note(copy_known=copied(twin, self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: self.__dict__[key] for key in ("origin", *_KEPT, "training")}
        routes = {
            mode: (records.pack(route.gm), route.signature) if isinstance(route, Exported) else route.packed()
            for mode, route in self.routes.items()
        }
        return {**kept, "routes": routes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        model, passes = state["origin"], pipeline(state["method"], state["plan"].sites)
        self.__dict__.update({key: state[key] for key in _KEPT})
        self._attach(model, {mode: _unpacked(packed, model, passes) for mode, packed in state["routes"].items()})
        self.training = state["training"]

    def extra_repr(self) -> str:
        return f"{self.method}, {len(self.plan.sites)} weights N:M, {len(self.plan.refusals)} dense"


def _unpacked(packed: Any, model: nn.Module, passes: list[Pass]) -> Exported | Fragments:
    if isinstance(packed, tuple):
        return Exported(records.unpack(packed[0], model), packed[1])
    from nm_compiler.fragments.dynamo import Fragments

    return Fragments.unpacked(packed, model, passes)


def _own_code(function: Any) -> Any:
    """The function with a code object of its own: TorchDynamo's recompile limit counts by code object, and would
    count all compiled models of a process, in both their modes, as one.
    """
    twin = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    return update_wrapper(twin, function)
