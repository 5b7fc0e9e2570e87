"""Dynamic batches: the smallest, the usual and the largest batch that an engine is built for.

Torch-TensorRT up to 2.13 takes an engine's shapes from the ranges of the exported program and tunes it for the batch that
the program was traced with; what its `Input` says of them only counts from 2.14 on. So a program is exported once
more here, traced with the usual batch, between the bounds that were asked for, and the inputs say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from nm_compiler.errors import NMError
from nm_compiler.wording import first_line

Batch = tuple[int, int, int]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def in_program_order(program: ExportedProgram, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """The inputs with their keywords in the order of the program. Raises NMError if they are not the program's."""
    spec = program.call_spec.in_spec
    assert spec is not None
    wanted_args, wanted_kwargs = pytree.tree_unflatten(range(spec.num_leaves), spec)
    if set(wanted_kwargs) != set(kwargs) or len(wanted_args) != len(inputs):
        raise NMError(
            f"the program takes {len(wanted_args)} inputs and the keywords {sorted(wanted_kwargs)}; given were {len(inputs)} "
            f"inputs and the keywords {sorted(kwargs)}. Pass what it was exported with"
        )
    ordered = (tuple(inputs), {name: kwargs[name] for name in wanted_kwargs})
    for name, value, traced in _leaves(program, ordered):
        if isinstance(traced, Tensor) and not (isinstance(value, Tensor) and value.ndim == traced.ndim):
            given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise NMError(f"input {name} of the program is a tensor of {traced.ndim} axes; given was {given}")
    return ordered


def check_bounded(program: ExportedProgram) -> None:
    """Raise NMError for an axis without an upper bound: its engine would be built for up to 4096, whatever the memory."""
    for name, axis, symbol in _dynamic_axes(program):
        if not _bounds(program, symbol)[1]:
            raise NMError(
                f"axis {axis} of input {name} has no upper bound, and TensorRT builds an engine for a range of shapes: "
                + ("give batch=(smallest, usual, largest)" if axis == 0 else "export it with Dim(..., max=...), or fixed")
            )


def with_profile(program: ExportedProgram, inputs: Inputs, batch: Batch) -> tuple[ExportedProgram, Inputs]:
    """The program exported again for batches from ``batch[0]`` to ``batch[2]``, and inputs of batch ``batch[1]``.

    Raises NMError if axis 0 is not dynamic, if another axis is and has no upper bound, or if the batches do not fit.
    """
    smallest, usual, largest = _checked(batch)
    axes = _dynamic_axes(program)
    symbols = {symbol for _, axis, symbol in axes if axis == 0}
    if len(symbols) != 1:
        raise NMError(
            f"batch={batch!r} needs a program whose inputs share one dynamic batch (axis 0), and this one has {len(symbols)}: "
            "export it with a Dim on axis 0 of every input that has a batch"
        )
    (symbol,) = symbols
    low, high = _bounds(program, symbol)
    if smallest < low or (high and largest > high):
        raise NMError(f"batch={batch!r} is outside what the program was exported for, {low} to {high or 'any'}")
    dims: dict[Any, Any] = {symbol: Dim("batch", min=smallest, max=largest)}
    for name, axis, other in axes:
        if other not in dims:
            low, high = _bounds(program, other)
            if not high or not other.is_Symbol:
                raise NMError(f"axis {axis} of input {name} has no upper bound: export it with Dim(..., max=...), or fixed")
            dims[other] = Dim(f"axis{len(dims)}", min=low, max=high)
    named = {(name, axis): dims[other] for name, axis, other in axes}
    batched = {name for name, axis, other in axes if axis == 0 and other == symbol}
    leaves = [_resized(value, usual) if name in batched else value for name, value, _ in _leaves(program, inputs)]
    shapes = ShapesCollection()
    for (name, _, traced), value in zip(_leaves(program, inputs), leaves, strict=True):
        if isinstance(traced, Tensor) and any((name, axis) in named for axis in range(traced.ndim)):
            shapes[value] = {axis: named[name, axis] for axis in range(traced.ndim) if (name, axis) in named}
    spec = program.call_spec.in_spec
    assert spec is not None
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    module = program.module(check_guards=False)
    try:
        again = torch.export.export(module, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(module, args, kwargs))
    except Exception as error:
        raise NMError(f"the program cannot take batch={batch!r}: {first_line(error)}") from error
    return again, (args, kwargs)


def specified(program: ExportedProgram, inputs: Inputs, torch_tensorrt: ModuleType) -> Inputs:
    """The inputs as Torch-TensorRT wants them: a `torch_tensorrt.Input` with three shapes where an axis is dynamic."""
    dynamic: dict[str, dict[int, Any]] = {}
    for name, axis, symbol in _dynamic_axes(program):
        dynamic.setdefault(name, {})[axis] = symbol
    leaves = []
    for name, value, _ in _leaves(program, inputs):
        if name not in dynamic:
            leaves.append(value)
            continue
        usual = list(value.shape)
        smallest, largest = list(usual), list(usual)
        for axis, symbol in dynamic[name].items():
            smallest[axis], largest[axis] = _bounds(program, symbol)
        shapes = {"min_shape": tuple(smallest), "opt_shape": tuple(usual), "max_shape": tuple(largest)}
        leaves.append(torch_tensorrt.Input(**shapes, dtype=value.dtype))
    spec = program.call_spec.in_spec
    assert spec is not None
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _checked(batch: Batch) -> Batch:
    numbers = isinstance(batch, (tuple, list)) and len(batch) == 3 and all(type(size) is int for size in batch)
    if not numbers or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise NMError(f"batch={batch!r}: give three whole numbers (smallest, usual, largest), from 1 on and in that order")
    if batch[1] == 1:
        raise NMError(
            f"batch={batch!r}: torch.export takes a batch of 1 for a constant, so no engine can be tuned for 1 and take more. "
            "Give a usual batch of 2, or export with a fixed batch of 1"
        )
    return batch


def _leaves(program: ExportedProgram, inputs: Inputs) -> list[tuple[str, Any, Any]]:
    """Name, value and traced (fake) value of every input, in the program's order."""
    traced = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [
        getattr(spec.arg, "name", "")
        for spec in program.graph_signature.input_specs
        if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT
    ]
    values = pytree.tree_leaves(inputs)
    if len(values) != len(names):
        raise NMError(f"the program takes {len(names)} inputs, {len(values)} were given: pass what it was exported with")
    return [(name, value, traced.get(name)) for name, value in zip(names, values, strict=True)]


def _dynamic_axes(program: ExportedProgram) -> list[tuple[str, int, Any]]:
    """Input, axis and symbolic size of every dynamic axis."""
    wanted = set(program.graph_signature.user_inputs)
    return [
        (node.name, axis, size.node.expr)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in wanted and isinstance(node.meta.get("val"), Tensor)
        for axis, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    ]


def _bounds(program: ExportedProgram, symbol: Any) -> tuple[int, int]:
    """The range of a dynamic axis; 0 is no upper bound. A lower bound of 2 is torch.export's own and means 1."""
    found = program.range_constraints.get(symbol)
    if found is None:
        return 1, 0
    upper = str(found.upper)
    low = int(found.lower)
    return (1 if low <= 2 else low), (int(upper) if upper.isdigit() else 0)


def _resized(value: Tensor, size: int) -> Tensor:
    """The first ``size`` rows, repeated as often as it takes."""
    return value.index_select(0, torch.arange(size, device=value.device) % max(1, value.shape[0]))
