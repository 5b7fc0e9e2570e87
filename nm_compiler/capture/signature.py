"""What a graph was captured with, and whether a call fits it.

A call of another structure, rank, static size or constant would silently run the wrong graph; it is an NMError that
says what was captured instead.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from nm_compiler.capture.explaining import describe, describe_leaf
from nm_compiler.errors import NMError

_HOW_SHAPES = {
    False: "and dynamic_shapes= for sizes that vary besides the batch",
    True: "and, since one of batch 1 stands for any batch, with dynamic_shapes=, such as ({},) to fix all sizes",
}
"""By whether an input has a batch of 1."""
_PLAIN = (type(None), bool, int, float, str)
_FLAGS, _WHOLE = (bool, np.bool_, torch.SymBool), (int, np.integer, torch.SymInt)


class Misfit(NMError):
    """A call that does not fit what was captured. facts: what differs, without the way out."""

    def __init__(self, facts: str, way_out: str) -> None:
        super().__init__(f"{facts}\n{way_out}")
        self.facts = facts


@dataclass(frozen=True)
class TensorInput:
    """One tensor input. sizes: an int where static, None where dynamic; low, high: range of a dynamic size.

    branching: the axes of dynamic sizes that, at 1, would have taken another branch of the model's Python.
    """

    sizes: tuple[int | None, ...]
    low: tuple[int, ...]
    high: tuple[int | None, ...]
    floating: bool
    branching: tuple[int, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Why ``value`` does not fit, or None."""
        if not isinstance(value, Tensor):
            return f"is {type(value).__name__}, a tensor was captured"
        if value.ndim != len(self.sizes):
            return f"has {value.ndim} axes, {len(self.sizes)} were captured"
        if value.is_floating_point() != self.floating:
            return f"is {value.dtype}, {'floating point' if self.floating else 'integer or bool'} was captured"
        for axis, size in enumerate(self.sizes):
            actual, high = value.shape[axis], self.high[axis]
            if size is not None and actual != size:
                return f"has size {actual} on axis {axis}, where {size} was captured"
            if size is None and (actual < self.low[axis] or (high is not None and actual > high)):
                limit = f"{self.low[axis]} to {high}" if high is not None else f"{self.low[axis]} or more"
                why = "batch norm in training needs" if self.low[axis] == 2 else "the captured branch holds for"
                return f"has size {actual} on axis {axis}, and {why} {limit}"
            if actual == 1 and axis in self.branching:
                return f"has size 1 on axis {axis}, for which forward() takes another branch than the captured one"
        return None

    def __str__(self) -> str:
        return f"[{', '.join('any' if size is None else str(size) for size in self.sizes)}]"


@dataclass(frozen=True)
class Signature:
    """The inputs of a captured graph and the structure of its outputs.

    arg_names: of the positional inputs; hidden: keyword inputs added at capture (``use_cache=False``);
    guards: conditions on sizes under which the captured branches hold, as Python expressions over ``L[name]``;
    modes: the training flag of each of the model's modules at capture; further: positional parameters of ``forward`` behind
    those of arg_names; defaults: what parameters of ``forward`` are by default, where that is a plain value.
    """

    arg_names: tuple[str, ...]
    kwarg_names: tuple[str, ...]
    hidden: Mapping[str, Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[Any, ...]
    paths: tuple[str, ...]
    guards: tuple[str, ...]
    modes: tuple[bool, ...]
    further: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Guards become functions of the flat inputs once, which TorchDynamo can trace into guards of its own."""
        scope = {"math": math, "torch": torch}
        conditions = (eval(f"lambda flat, L: {_on_leaves(guard, self.paths)}", scope) for guard in self.guards)
        self.__dict__["_conditions"] = tuple(conditions)
        plain = all(isinstance(each, TensorInput) for each in self.inputs) and len(self.inputs) == len(self.arg_names)
        self.__dict__["_tensors_only"] = plain and not self.kwarg_names and self.in_spec == _spec_of_leaves(len(self.inputs))

    @classmethod
    def of(
        cls, program: ExportedProgram, gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any],
        hidden: Mapping[str, Any], model: nn.Module, branching: Collection[str] = (),
    ) -> Signature:  # fmt: skip
        """Read the signature off an exported program. args, kwargs: the examples it was exported with.

        branching: symbols of sizes that take another branch at 1.
        """
        placeholders = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
        alone = _alone_in_batch_norm(gm)
        inputs = tuple(
            _tensor_input(value, ranges, alone, branching) if isinstance(value, Tensor) else leaf
            for value, leaf in zip(placeholders, leaves, strict=True)
        )
        arg_names = _arg_names(model, len(args))
        flat, in_spec = pytree.tree_flatten_with_path((args, dict(kwargs)))
        paths = tuple(_path(key, arg_names) for key, _ in flat)
        guards = tuple(getattr(program, "_guards_code", None) or ())
        out_spec = _mutable(program.call_spec.out_spec)
        modes = tuple(module.training for module in model.modules())
        further, defaults = _positional(model)[len(args) :], _defaults(model)
        return cls(arg_names, tuple(kwargs), dict(hidden), in_spec, out_spec, inputs, paths, guards, modes, further, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Tree specs pickle as trees of numbers, which do not depend on the torch version."""
        specs = {key: pytree.tree_unflatten(list(range(spec.num_leaves)), spec) for key, spec in self._specs().items()}
        return {**{k: v for k, v in self.__dict__.items() if k not in ("_conditions", "_tensors_only")}, **specs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        specs = {key: pytree.tree_structure(state[key]) for key in ("in_spec", "out_spec")}
        self.__dict__.update({**state, **specs})
        self.__post_init__()

    def _specs(self) -> dict[str, pytree.TreeSpec]:
        return {"in_spec": self.in_spec, "out_spec": self.out_spec}

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of the graph. Raises NMError if the call does not fit what was captured."""
        if self.__dict__["_tensors_only"] and not kwargs and len(args) == len(self.inputs) and _all_tensors(args):
            return self._fitting(list(args), args, {})
        named = {**self.hidden, **kwargs}
        if len(args) != len(self.arg_names) or tuple(named) != self.kwarg_names:
            args, named = self._rearrange(args, named)
        flat, spec = pytree.tree_flatten((args, named))
        if spec != self.in_spec:
            self._refuse(args, kwargs, "its structure differs")
        return self._fitting(flat, args, named)

    def _fitting(self, flat: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs, of the right structure. Raises NMError for one that does not fit."""
        for value, expected, path in zip(flat, self.inputs, self.paths, strict=True):
            if isinstance(expected, TensorInput):
                problem = expected.problem(value)
                if problem:
                    self._refuse(args, kwargs, f"{path} {problem}")
            elif value is not expected and not _is_same(value, expected):
                self._refuse(args, kwargs, f"{path} is {describe_leaf(value)}, the graph holds for {expected!r}")
        if self.guards:
            self._check_guards(flat, args, kwargs)
        return flat

    def _rearrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional inputs given by keyword, keywords by place or in another order, and defaults are the same call."""
        names = (*self.arg_names, *self.further)
        if len(args) > len(names):
            self._refuse(args, kwargs, f"{len(args)} positional inputs, {len(self.arg_names)} were captured")
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        wanted = (*self.arg_names, *self.kwarg_names)
        missing = [name for name in wanted if name not in named]
        extra = [name for name, value in named.items() if name not in wanted and not self._is_default(name, value)]
        if missing or extra:
            parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra)
            self._refuse(args, kwargs, "; ".join(parts))
        return tuple(named[name] for name in self.arg_names), {name: named[name] for name in self.kwarg_names}

    def _is_default(self, name: str, value: Any) -> bool:
        return isinstance(value, _PLAIN) and name in self.defaults and _is_same(value, self.defaults[name])

    def _check_guards(self, flat: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(self.arg_names, args, strict=True)), **kwargs}
        for guard, condition in zip(self.guards, self.__dict__["_conditions"], strict=True):
            try:
                holds = condition(flat, given)
            except ZeroDivisionError:  # a size of 0 or 1 that the captured branch never meant
                holds = False
            except KeyError:  # an input inside *args or **kwargs of forward, which has no name here
                holds = True
            if not holds:
                self._refuse(args, kwargs, f"the captured branch holds only while {_readable(guard)}")

    def fixed(self, place: int, axis: int) -> bool:
        """Whether a condition leaves the axis of an input, one that the capture has as dynamic, only its own size."""
        return any(
            re.fullmatch(rf"flat\[{place}\]\.size\(\)\[{axis}\] == \d+", _on_leaves(g, self.paths)) for g in self.guards
        )

    def conditions(self) -> tuple[str, ...]:
        """What sizes have to be for the captured branches to hold, in words: for who cannot ask `flatten`, such as files."""
        found = [_readable(guard) for guard in self.guards]
        for each, path in zip(self.inputs, self.paths, strict=True):
            for axis, size in enumerate(each.sizes if isinstance(each, TensorInput) else ()):
                low, high, name = each.low[axis], each.high[axis], f"{path}.shape[{axis}]"
                found += [f"{name} >= {low}"] if size is None and low > 1 else []
                found += [f"{name} <= {high}"] if size is None and high is not None else []
                found += [f"{name} != 1"] if size is None and low < 2 and axis in each.branching else []
        return tuple(dict.fromkeys(found))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _refuse(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: str) -> None:
        """Raises. Not traced: a compiled call leaves its graph here, to raise as the eager one does."""
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        raise Misfit(
            f"this call does not fit the captured graph: {why}\n"
            f"  captured: ({', '.join(f'{p}: {_show(i)}' for p, i in zip(self.paths, self.inputs, strict=True))})\n"
            f"  called:   {describe(args, kwargs)}",
            f"Capture with example inputs like this call ({_HOW_SHAPES[any(_is_single(leaf) for leaf in leaves)]}). "
            "A model that is called in many ways trains on the TorchDynamo route: nm.compile(model) without example inputs.",
        )


def _is_same(value: Any, captured: Any) -> bool:
    """Whether a value that is no tensor is the captured one. True, 1 and 1.0 are equal, what a graph makes of them is not."""
    if isinstance(value, Tensor) or value != captured:
        return False
    return all(isinstance(value, kind) is isinstance(captured, kind) for kind in (_FLAGS, _WHOLE))


def _spec_of_leaves(count: int) -> pytree.TreeSpec:
    """Of so many positional inputs, each a leaf, and none by name."""
    return pytree.tree_structure(((0,) * count, {}))


def _all_tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _is_single(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == 1


def _alone_in_batch_norm(gm: GraphModule) -> set[str]:
    """Sizes that, at 1, leave a batch norm in training with one value a channel: its variance would be NaN for good."""
    found = set()
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default and node.args[5]:
            batch, _, *space = node.args[0].meta["val"].shape
            if all(isinstance(size, int) and size == 1 for size in space):
                found.add(str(batch))
    return found


def _tensor_input(value: Tensor, ranges: Mapping[str, Any], alone: set[str], branching: Collection[str]) -> TensorInput:
    sizes: list[int | None] = []
    low: list[int] = []
    high: list[int | None] = []
    for size in value.shape:
        sizes.append(size if isinstance(size, int) else None)
        bounds = ranges.get(str(size))
        lower, upper = (int(bounds.lower), bounds.upper) if bounds is not None else (0, None)
        # export never takes 0 or 1 for a dynamic size; the graph runs them
        low.append(2 if str(size) in alone else 0 if lower <= 2 else lower)
        high.append(int(upper) if upper is not None and upper.is_Integer and int(upper) < 2**31 else None)
    other = tuple(axis for axis, size in enumerate(value.shape) if not isinstance(size, int) and str(size) in branching)
    return TensorInput(tuple(sizes), tuple(low), tuple(high), value.is_floating_point(), other)


def _mutable(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Plain dicts and lists: a model that is an FX graph, such as a feature extractor, is exported with FX's own."""
    kinds: dict[Any, type] = {immutable_dict: dict, immutable_list: list}
    if spec.is_leaf():
        return spec
    return pytree.TreeSpec(kinds.get(spec.type, spec.type), spec.context, [_mutable(child) for child in spec.children()])


def _arg_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """What ``forward`` calls its first inputs; those of ``*xs`` are ``xs[0]``, ``xs[1]``, as guards have them."""
    names: list[str] = []
    for each in inspect.signature(model.forward).parameters.values():
        if each.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{each.name}[{place}]" for place in range(count - len(names))]
        if each.kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            break
        names.append(each.name)
    return tuple(names[:count]) if len(names) >= count else tuple(f"input {place}" for place in range(count))


def _positional(model: nn.Module) -> tuple[str, ...]:
    """The parameters of ``forward`` that may be given by place, but for ``*xs``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(each.name for each in inspect.signature(model.forward).parameters.values() if each.kind in kinds)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """By the parameter of ``forward``."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {each.name: each.default for each in parameters if isinstance(each.default, _PLAIN)}


def _path(key: Sequence[Any], arg_names: Sequence[str]) -> str:
    """``(SequenceKey(0), SequenceKey(1), MappingKey('mask'))`` to ``name_of_arg_1['mask']``."""
    which, first, *rest = key
    name = arg_names[first.idx] if which.idx == 0 else first.key
    return str(name) + "".join(str(part) for part in rest)


def _on_leaves(guard: str, paths: Sequence[str]) -> str:
    """A guard that reads the flat inputs: ``L['cache']['keys'][0]`` is a path in the pytree, which a cache need not index."""
    for place, path in sorted(enumerate(paths), key=lambda each: -len(each[1])):
        name, *_ = re.split(r"[\[.]", path, maxsplit=1)
        guard = re.sub(re.escape(f"L['{name}']{path[len(name) :]}") + r"(?!\w)", f"flat[{place}]", guard)
    return guard


def _readable(guard: str) -> str:
    """``L['x'].size()[0] == 2`` to ``x.shape[0] == 2``."""
    return re.sub(r"L\['(\w+)'\](\S*?)\.size\(\)\[(\d+)\]", r"\1\2.shape[\3]", guard)


def _show(value: Any) -> str:
    return str(value) if isinstance(value, TensorInput) else repr(value)
