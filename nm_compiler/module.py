"""SparseModule, the carrier: the rewritten graphs, run over the original model's own children and parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from nm_compiler import records
from nm_compiler.capture import bind, flat_copy
from nm_compiler.errors import NMError
from nm_compiler.evaluate import effective_weights
from nm_compiler.methods.base import Method
from nm_compiler.signature import Signature
from nm_compiler.sites import Plan
from nm_compiler.state import RECIPE, SUFFIXES, Weight, read_recipe, register, unregister, write_recipe

Graphs = Mapping[bool, tuple[GraphModule, Signature]]


class SparseModule(nn.Module):
    """A model that trains with N:M weights.

    It shares the model's ``_parameters``, ``_buffers`` and ``_modules``, so names, ``state_dict``, ``.to()``, hooks of
    DDP and so on are the model's own plus the state beside the weights. ``forward`` runs one rewritten graph per mode.
    """

    def __init__(self, model: nn.Module, graphs: Graphs, plan: Plan, method: Method, seed: int) -> None:
        super().__init__()
        self._attach(model, graphs)
        self.__dict__.update(plan=plan, method=method, seed=seed)

    def _attach(self, model: nn.Module, graphs: Graphs) -> None:
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = getattr(model, name)
        modules = [module for _, module in model.named_modules()]
        flags = {mode: _flags(model, modules, mode) for mode in (False, True)}
        self.__dict__.update(
            origin=model, graphs=dict(graphs), training=model.training, frozen=False, _watched=modules, _expected=flags
        )
        self.__dict__["forward"] = MethodType(_own_code(type(self).forward), self)

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode. Raises NMError for a call that does not fit what was captured."""
        if self.frozen:
            raise NMError("this model was frozen: use what nm.freeze returned, the plain model with zeros in its weights")
        if not torch.compiler.is_compiling():
            self._check_modes()
        gm, signature = self.graphs[self.training]
        outputs = gm(*signature.flatten(args, kwargs))
        return pytree.tree_unflatten(list(outputs), signature.out_spec)

    def _check_modes(self) -> None:
        for module, expected in zip(self._watched, self._expected[self.training], strict=True):
            if module.training is not expected:
                name = next(name for name, m in self.origin.named_modules() if m is module)
                now, then = ("training", "evaluation") if module.training else ("evaluation", "training")
                raise NMError(
                    f"{name or 'the model'} ({type(module).__name__}) is in {now} mode, but was captured in {then} mode: "
                    "switch the whole model with train() and eval(), or set that mode in the model's own train()"
                )

    def train(self, mode: bool = True) -> SparseModule:
        """Switch the mode as the model's own ``train`` does, so deliberately frozen layers stay frozen."""
        self.origin.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for gm, _ in self.graphs.values():
            for name, value in gm.__dict__["extras"].items():
                if isinstance(value, Tensor):
                    gm.__dict__["extras"][name] = gm.__dict__[name] = fn(value)
            records.move_devices(gm, fn)
        return self

    def __getattr__(self, name: str) -> Any:
        """Plain attributes of the model (``config``, ``num_classes``); its other methods would run dense weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get("origin")
            if origin is None or name.startswith("__") or not hasattr(origin, name):
                raise
        value = getattr(origin, name)
        if callable(value) and not isinstance(value, (nn.Module, Tensor)):
            raise AttributeError(
                f"{type(origin).__name__}.{name} would run the dense weights: only forward() was captured. "
                f"Freeze first, then call it on the frozen model (or on .origin, if dense is what you want)"
            )
        return value

    # -- the plan ----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> list[Weight]:
        """The planned weights, in the model's order."""
        return [Weight(site, self.origin) for site in self.plan.sites]

    def graph(self, training: bool | None = None) -> GraphModule:
        """The rewritten graph of a mode; of the current one by default."""
        gm: GraphModule = self.graphs[self.training if training is None else training][0]
        return gm

    def masked(self, name: str) -> tuple[Tensor, Tensor | None]:
        """What the planned weight ``name`` is multiplied with now: forward, and backward under Bi-Mask."""
        for training in (False, True):
            forward, backward = effective_weights(self.graph(training), name)
            if forward is not None:
                return forward, backward
        raise AssertionError(f"{name} is planned but no graph masks it")

    def masked_parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by name, planned weights as their masks leave them; what `verify` looks at."""
        state, planned = set(self.state_names()), {site.name for site in self.plan.sites}
        own = {name: p.detach() for name, p in self.named_parameters() if name not in state}
        return {name: self.masked(name)[0] if name in planned and not self.frozen else p for name, p in own.items()}

    def state_names(self) -> list[str]:
        """The names of everything that was registered on the model."""
        present = [f"{w.site.name}_{suffix}" for w in self.weights for suffix in SUFFIXES if w.has(suffix)]
        return [*present, RECIPE]

    # -- loading -----------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Check the whole state before anything is written; a dense state_dict gets fresh state. Raises NMError."""
        tag = state_dict.get(prefix + RECIPE)
        fresh = fresh_state(self, state_dict, prefix)
        own = self._buffers[RECIPE]
        assert own is not None
        if tag is None:
            stray = [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) in fresh]
            if stray:
                raise NMError(f"this state_dict has {stray[0]!r} but no {prefix + RECIPE!r}: save the whole state_dict again")
            state_dict.update({prefix + name: value for name, value in fresh.items()})
        else:
            self._compare(read_recipe(tag), read_recipe(own))
            self._check_values(state_dict, prefix, fresh)
        state_dict[prefix + RECIPE] = own
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _compare(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        if {k: v for k, v in theirs.items() if k != "weights"} != {k: v for k, v in ours.items() if k != "weights"}:
            raise NMError(
                f"this state_dict was trained with {_method_text(theirs)}, the model is compiled for {_method_text(ours)}: "
                "compile with the same method and layout, or load the dense weights only (nm.freeze, then state_dict)"
            )
        for name in {**theirs["weights"], **ours["weights"]}:
            there, here = theirs["weights"].get(name, "dense"), ours["weights"].get(name, "dense")
            if there != here:
                shape = list(self.plan.shapes.get(name, ()))
                raise NMError(
                    f"{name} of shape {shape} is {there} in this state_dict and {here} in the compiled model: "
                    "compile with the same pattern=, include= and exclude="
                )

    def _check_values(self, state_dict: Mapping[str, Any], prefix: str, fresh: Mapping[str, Tensor]) -> None:
        for weight in self.weights:
            state = {}
            for suffix in SUFFIXES:
                name = f"{weight.site.name}_{suffix}"
                if name not in fresh:
                    continue
                value = state_dict.get(prefix + name)
                if not isinstance(value, Tensor) or value.shape != fresh[name].shape:
                    found = "missing" if value is None else f"of shape {list(value.shape)}"
                    raise NMError(f"{name} is {found} in this state_dict, {list(fresh[name].shape)} is needed")
                state[suffix] = value
            problem = self.method.problem(weight.site, state)
            if problem:
                raise NMError(f"{weight.site.name} of shape {list(weight.site.shape)}: {problem}; this state_dict is damaged")

    # -- copying -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        model = copy.deepcopy(self.origin, memo)
        graphs = {
            mode: (bind(flat_copy(gm.graph), model, copy.deepcopy(gm.__dict__["extras"], memo)), signature)
            for mode, (gm, signature) in self.graphs.items()
        }
        twin._attach(model, graphs)
        twin.__dict__.update({key: self.__dict__[key] for key in ("plan", "method", "seed", "frozen")})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: self.__dict__[key] for key in ("origin", "plan", "method", "seed", "frozen", "training")}
        graphs = {mode: (records.pack(gm), signature) for mode, (gm, signature) in self.graphs.items()}
        return {**kept, "graphs": graphs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        model = state["origin"]
        graphs = {}
        for mode, (packed, signature) in state["graphs"].items():
            graph, extras = records.unpack(packed)
            graphs[mode] = (bind(graph, model, extras), signature)
        self._attach(model, graphs)
        self.__dict__.update({key: state[key] for key in ("plan", "method", "seed", "frozen", "training")})

    def extra_repr(self) -> str:
        return f"{self.method}, {len(self.plan.sites)} weights N:M, {len(self.plan.refusals)} dense"


def _own_code(function: Any) -> Any:
    """The function with a code object of its own: TorchDynamo's recompile limit counts by code object, and would
    count all compiled models of a process, in both their modes, as one.
    """
    twin = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    return update_wrapper(twin, function)


def fresh_state(module: SparseModule, values: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The state every weight would start with, by full name. values: weights to derive it from, where present."""
    fresh = {}
    for weight in module.weights:
        name = weight.site.name
        given = values.get(prefix + name)
        base = given.detach() if isinstance(given, Tensor) and given.shape == weight.param.shape else weight.param.detach()
        for suffix, value in module.method.state(weight.site, base).items():
            fresh[f"{name}_{suffix}"] = value.detach()
    return fresh


def attach_state(model: nn.Module, plan: Plan, method: Method) -> list[str]:
    """Register the fresh state of all planned weights and the recipe tag. Returns the names. All or nothing."""
    weights = [Weight(site, model) for site in plan.sites]
    extras: dict[str, Tensor] = {}
    for weight in weights:
        for suffix, value in method.state(weight.site, weight.param.detach()).items():
            extras[f"{weight.site.name}_{suffix}"] = value
    some = weights[0].param
    extras[RECIPE] = write_recipe(method.layout(), plan.sites).to(some.device)
    register(model, extras)
    return list(extras)


def detach_state(model: nn.Module, names: Iterator[str] | list[str]) -> None:
    """Take the state off the model again."""
    unregister(model, names)


def unwrap(model: Any) -> SparseModule:
    """The SparseModule inside DDP or ``torch.compile``. Raises NMError if there is none."""
    inner = model
    while not isinstance(inner, SparseModule):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise NMError(f"{type(model).__name__} is not a compiled model: call nm.compile(model, example_inputs) first")
    return inner


def _flags(model: nn.Module, modules: list[nn.Module], mode: bool) -> list[bool]:
    before = [(module, module.training) for module in modules]
    try:
        model.train(mode)
        return [module.training for module in modules]
    finally:
        for module, flag in before:
            module.training = flag


def _method_text(recipe: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in recipe.items() if key not in ("method", "weights"))
    return f"{recipe.get('method')}({options})"
