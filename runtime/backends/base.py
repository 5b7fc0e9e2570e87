"""What a backend is, what it gets and what it gives back."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.node import map_arg

from nm_compiler.capture.example import at_least_two
from nm_compiler.capture.signature import Signature
from nm_compiler.errors import NMError
from nm_compiler.graph import tensor_outputs
from nm_compiler.runtime.products import Decision, Product, products
from nm_compiler.scaled import Scaled, stood_in
from nm_compiler.sites.plan import Site


@dataclass(frozen=True)
class Job:
    """One graph to lower.

    gm: plain aten, flat inputs and outputs, N:M constants; sites: planned weights by name; flat: example inputs;
    force: globs of weights that run sparse unmeasured; options: the user's, for the backend.
    """

    gm: GraphModule
    signature: Signature
    sites: Mapping[str, Site]
    flat: tuple[Any, ...]
    force: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def products(self) -> list[Product]:
        """The products that read a planned weight."""
        return list(products(self.gm, self.sites))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The example inputs that are tensors."""
        return tuple(value for value in self.flat if isinstance(value, Tensor))

    def sizes(self, value: Tensor) -> list[int]:
        """Sizes of a value in the graph as they are for the example inputs, whatever the capture put in a dynamic axis."""
        known: dict[Any, int] = {}
        for example, node in zip(self.flat, self.gm.graph.find_nodes(op="placeholder"), strict=True):
            if isinstance(example, Tensor):
                pairs = zip(node.meta["val"].shape, example.shape, strict=True)
                known |= {size.node.expr: real for size, real in pairs if not isinstance(size, int)}
        return [size if isinstance(size, int) else _real(size, known) for size in value.shape]

    def program(self, *, dynamic: bool = True, one_batch: bool = False, tensors_out: bool = False) -> ExportedProgram:
        """The graph exported anew; its inputs are the tensors alone, and with ``tensors_out`` its outputs too.

        dynamic: with the dynamic axes that it was captured with, else for the sizes of the examples alone. An axis to which a
        condition of the capture leaves one size (``x.shape[0] == 2``) is not dynamic, nor are others of the same size.
        one_batch: axis 0 of all inputs is the same batch, also where the capture did not need it to be.
        """
        examples, axes, fixed = list[Tensor](), list[dict[int, str]](), self._fixed()
        for value, node in zip(self.flat, self.gm.graph.find_nodes(op="placeholder"), strict=True):
            if isinstance(value, Tensor):
                sizes = node.meta["val"].shape if dynamic else ()
                free = {axis: str(size) for axis, size in enumerate(sizes) if not isinstance(size, int)}
                named = {axis: name for axis, name in free.items() if name not in fixed}
                axes.append({axis: "batch" if one_batch and axis == 0 else name for axis, name in named.items()})
                examples.append(at_least_two(value, set(axes[-1])))
        gm = _of_tensors(self.gm, self.flat, out=tensors_out)
        scaled = {name: value for name, value in self.gm.named_buffers() if isinstance(value, Scaled)}
        with torch.no_grad(), stood_in(self.gm, read=False):
            try:
                program = _exported(gm, examples, axes, _shared(axes))
            except torch._dynamo.exc.UserError:  # a size that is a formula of another: torch finds out which
                program = _exported(gm, examples, axes, {})
        program.state_dict.update(scaled)
        return program

    def _fixed(self) -> set[str]:
        """The symbols of sizes to which the conditions of the capture leave one value."""
        found = set[str]()
        for place, node in enumerate(self.gm.graph.find_nodes(op="placeholder")):
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if not isinstance(size, int) and self.signature.fixed(place, axis):
                    found.add(str(size))
        return found


@dataclass(frozen=True)
class Result:
    """What runs the graph, and what became of every product, by its node. notes: lines for the report; artifact: files.

    rough: how far outputs may be from the model's, relative, where the user asked for less precision than the dtype has.
    """

    run: nn.Module
    decisions: Mapping[str, Decision]
    products: Sequence[Product]
    notes: tuple[str, ...] = ()
    artifact: Any = None
    takes_tensors_only: bool = False
    rough: float = 0.0


class Backend(ABC):
    """A runtime. notes: what `choose_backend` has to say about why it is this one.

    later: whether a graph may come with folded weights that are computed when they are read (`nm_compiler.scaled`), and the
    result may hold such weights too: they are computed for good when it has been checked.
    for_files: the result is a file, and the module that comes back may never be called: such weights wait until it is.
    any_pattern: whether it has kernels for patterns sparser than 2:4.
    """

    name: str = ""
    notes: tuple[str, ...] = ()
    later: bool = False
    for_files: bool = False
    any_pattern: bool = False

    @abstractmethod
    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run here with this dtype and device, with the way out; None if it can."""

    @abstractmethod
    def lower(self, job: Job) -> Result:
        """Lower a graph. Raises NMError, nothing changed, where it cannot."""

    def take(self, job: Job, *known: str) -> dict[str, Any]:
        """The user's options. Raises NMError for one that this backend does not have."""
        unknown = sorted(set(job.options) - set(known))
        if unknown:
            raise NMError(f"backend={self.name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        return dict(job.options)


def _real(size: torch.SymInt, known: Mapping[Any, int]) -> int:
    """Of a dynamic size, where the formulas in ``known`` have these values; as the capture had it if that says nothing."""
    found = size.node.expr.subs(known)
    return int(found) if found.is_Integer else int(getattr(size.node, "hint", None) or 1)


def _of_tensors(gm: GraphModule, flat: Sequence[Any], *, out: bool) -> GraphModule:
    """The graph with its other inputs fixed: exported programs take tensors. Names of inputs and weights stay.

    out: without its other outputs, too.
    """
    output, kept = gm.graph.output_node(), tensor_outputs(gm)
    others_out = out and len(kept) < len(output.args[0])  # type: ignore[arg-type]
    if all(isinstance(value, Tensor) for value in flat) and not others_out:
        return gm
    twin = GraphModule(gm, copy.deepcopy(gm.graph))
    inputs = zip(twin.graph.find_nodes(op="placeholder"), flat, strict=True)
    fixed = {node: value for node, value in inputs if not isinstance(value, Tensor)}
    for user in {user: None for node in fixed for user in node.users}:
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda arg: fixed.get(arg, arg))
    if others_out:
        last: Any = twin.graph.output_node()
        last.args = (tuple(last.args[0][at] for at in kept),)
        twin.graph.eliminate_dead_code()
    for node in fixed:
        twin.graph.erase_node(node)
    twin.recompile()
    return twin


def _shared(axes: Sequence[Mapping[int, str]]) -> dict[str, Any]:
    """A dimension for each size that the capture knew by a name: inputs that share their batch keep sharing it."""
    names = dict.fromkeys(name for each in axes for name in each.values() if name.isidentifier())
    return {name: torch.export.Dim(f"size{number}") for number, name in enumerate(names)}


def _exported(
    gm: GraphModule, examples: list[Tensor], axes: Sequence[Mapping[int, str]], known: Mapping[str, Any]
) -> ExportedProgram:
    shapes = tuple({axis: known.get(name, torch.export.Dim.AUTO) for axis, name in each.items()} or None for each in axes)
    return torch.export.export(gm, tuple(examples), dynamic_shapes=shapes)
