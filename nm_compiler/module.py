"""SparseModule, the carrier: the rewritten graphs, run over the original model's own children and parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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
from nm_compiler.loading import check_values, compare, start_afresh
from nm_compiler.methods.base import Method
from nm_compiler.signature import Signature
from nm_compiler.sites import Plan
from nm_compiler.state import RECIPE, Weight, mark, read_recipe, register, unmark, unregister, write_recipe

_SHARED = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
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
        for name in _SHARED:
            self.__dict__[name] = getattr(model, name)
        self.__dict__.update(
            origin=model, graphs=dict(graphs), training=model.training, frozen=False, _watched=list(model.modules())
        )
        self.__dict__["forward"] = MethodType(_own_code(type(self).forward), self)

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode. Raises NMError for a call that does not fit what was captured."""
        if self.frozen:
            raise NMError("this model was frozen: use what nm.freeze returned, the plain model with zeros in its weights")
        gm, signature = self.graphs[self.training]
        self._check_modes(signature.modes)
        outputs = gm(*signature.flatten(args, kwargs))
        return pytree.tree_unflatten(list(outputs), signature.out_spec)

    def _check_modes(self, modes: tuple[bool, ...]) -> None:
        for module, expected in zip(self._watched, modes, strict=True):
            if module is not self.origin and module.training is not expected:
                self._refuse_mode(module)

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
        own = [f"{site.name}_{suffix}" for site in self.plan.sites for suffix in self.method.suffixes(site)]
        return [*own, RECIPE]

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
        state_dict[prefix + RECIPE] = own
        self.origin._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.origin._save_to_state_dict(destination, prefix, keep_vars)  # with the model's own extra state and overrides

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
    mark(model, plan.sites)
    return list(extras)


def detach_state(model: nn.Module, plan: Plan, names: list[str]) -> None:
    """Take the state and the marks off the model again."""
    unregister(model, names)
    unmark(model, plan.sites)


def unwrap(model: Any) -> SparseModule:
    """The SparseModule inside DDP, an averaged model or ``torch.compile``. Raises NMError if there is none."""
    inner = model
    while not isinstance(inner, SparseModule):
        if isinstance(inner, _WRAPPERS):
            inner = inner.module
        elif isinstance(inner, nn.Module) and "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        else:
            raise NMError(_no_carrier(model))
    return inner


def _no_carrier(model: Any) -> str:
    kind = type(model).__name__
    inside = [n for n, m in model.named_modules() if isinstance(m, SparseModule)] if isinstance(model, nn.Module) else []
    if inside:
        return f"{kind} is not a compiled model itself, but its submodule {inside[0]!r} is: pass that one"
    return f"{kind} is not a compiled model: call nm.compile(model, example_inputs) first"
