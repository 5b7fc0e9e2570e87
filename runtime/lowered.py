"""What `nm.lower` returns: called as the model is, with the record of what became of every weight.

Loading a saved one begins with this module, and torch traces its graph again before anything of it runs: so the ops that a
backend may have put there are registered here, not only where `nm.lower` is called.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

import nm_compiler.runtime.cusparselt.int8
import nm_compiler.runtime.cusparselt.op
import nm_compiler.runtime.cusparselt.unfold  # noqa: F401 - these register them
from nm_compiler.capture.signature import Misfit, Signature
from nm_compiler.capture.watching import autocast_of
from nm_compiler.errors import NMError
from nm_compiler.graph import getattr_path
from nm_compiler.runtime.backends.base import Result
from nm_compiler.runtime.native.ops import CONV2D, LINEAR
from nm_compiler.runtime.native.pages import packed_names
from nm_compiler.runtime.no_gradient import without_gradients
from nm_compiler.scaled import keep
from nm_compiler.sites.plan import Plan, Site
from nm_compiler.wording import dtype_name

_AGAIN = (
    "Lower the model with example inputs like this call. Sizes that vary besides the batch are freed by dynamic_shapes=, from "
    "an example of 2 or more; calls of several kinds are a lowered model each"
)
"""What to do about a call that does not fit."""
_RUN_AGAIN = "Lower the parts of the model again with nm.lower_parts, and have run= make a call like this one as well"


class Lowered(nn.Module):
    """A model in evaluation mode on a runtime.

    Plain attributes of the model (``config``, ``num_classes``) are there too, as they were when it was lowered.

    backend: its name; result: products, decisions, notes and artifact of the backend; error: of the check after lowering,
    relative, None if it was left out; sites: planned weights; unread: those that no product reads, and why; dense: all other
    weights, and why. Inputs are cast to the dtype it was lowered to; outputs are in that dtype.
    `nm.report` shows what is sparse, and why the rest is not.
    inert: whether something runs it that has no gradient, of which autograd would know nothing.
    fixed: whether it computes in the dtypes it was lowered for and no others: `torch.autocast` does not reach into it.
    packed_for: the dtype that data has at all packed products, if it is one; captured: those of the inputs. A call with others
    is watched: packed products take any, where torch's own refuse what the weight has not.
    part: its name in the model, if it is one of the parts that `nm.lower_parts` made; hooked: modules in it that had hooks.
    settled: whether folded weights are there; else the first call, or who asks for them, has them computed, and gets an
    NMError if the model's weights were changed in between.
    """

    title: str
    backend: str
    result: Result
    signature: Signature
    plan: Plan
    sites: Mapping[str, Site]
    dense: Mapping[str, str]
    unread: Mapping[str, str]
    dtype: torch.dtype | None
    notes: tuple[str, ...]
    error: float | None
    part: str
    hooked: tuple[str, ...]
    settled: bool
    inert: bool
    fixed: bool
    packed_for: torch.dtype | None
    captured: tuple[torch.dtype | None, ...]
    attributes: Mapping[str, Any]

    def __init__(self, result: Result, **facts: Any) -> None:
        super().__init__()
        self.run = result.run
        self.__dict__.update(
            **{"result": result, "error": None, "part": "", "hooked": (), "settled": True, "attributes": {}, **facts}
        )
        kernels = any(decision.kernel for decision in result.decisions.values())
        self.inert = self.backend == "tensorrt" or (self.backend == "cpu" and kernels)
        self.fixed = self.dtype is not None or self.inert or (self.backend == "cusparselt" and kernels)
        self.training = False
        known = {product.dtype for product in self.result.products}
        self.packed_for, self.captured = None, ()
        if self.backend == "cpu" and self.inert and self.dtype is None and len(known) == 1:
            (self.packed_for,) = known
            self.captured = _taken(self.run)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it. Raises NMError for a call that does not fit what was captured."""
        self.settle()
        if self.dtype is not None:
            args, kwargs = pytree.tree_map_only(Tensor, self._cast, (args, kwargs))
        try:
            flat = self.signature.flatten(args, kwargs)
        except Misfit as error:
            raise Misfit(error.facts, _RUN_AGAIN if self.part else _AGAIN) from None
        if self.result.takes_tensors_only:
            flat = [value for value in flat if isinstance(value, Tensor)]
        casts = self._autocast(flat) if self.part or self.fixed else None
        watched = self.packed_for is not None and not torch.compiler.is_compiling() and self._is_strange(flat)
        try:
            run: Any = _Watched(self.run, self._refusal_of) if watched else self.run
            with contextlib.nullcontext() if casts is None else torch.autocast(casts, enabled=False):
                outputs: Any = run(*flat)
        except RuntimeError as error:
            other = self._other_dtype(flat)
            if other is not None:
                raise other from error
            raise
        leaves = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        if self.inert:
            leaves = without_gradients(leaves, flat, self.title)
        return pytree.tree_unflatten(leaves, self.signature.out_spec)

    def __prepare_scriptable__(self) -> NoReturn:
        """For torch.jit.script, also of what this is part of. Raises NMError."""
        raise NMError(
            f"torch.jit.script reads Python, and this lowered {self.title} is a graph: record a call with torch.jit.trace, or "
            "script the model that was lowered"
        )

    def __getattr__(self, name: str) -> Any:
        """The model's plain attributes. Raises AttributeError that says what there is in the place of its methods."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "title" not in self.__dict__:
                raise
        if name in self.__dict__["attributes"]:
            return self.attributes[name]
        if self.part:
            raise AttributeError(
                f"{self.part} is a lowered part ({self.title}) and has no {name!r}: only its forward() was lowered. Where the "
                "model reads that, name the module around it in parts= of nm.lower_parts, or the layers inside it"
            )
        raise AttributeError(
            f"a lowered {self.title} has no attribute {name!r}: only forward() was lowered. Where a method of the model calls "
            "it, as generate() does, lower parts of the model: nm.lower_parts(model, parts, run)"
        )

    @property
    def device(self) -> torch.device:
        """Where its tensors lie; the CPU if it has none."""
        held = itertools.chain(super().named_parameters(), super().named_buffers())
        return next((tensor.device for _, tensor in held), torch.device("cpu"))

    def train(self, mode: bool = True) -> Lowered:
        """Stays in evaluation mode: there is nothing left to train."""
        return self

    def settle(self) -> Lowered:
        """Give the folded weights memory of their own, if they have none yet. Returns itself."""
        if not self.settled:
            keep(self)
            self.__dict__["settled"] = True
        return self

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """As of any module."""
        return super(Lowered, self.settle()).named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        return super(Lowered, self.settle()).state_dict(*args, **kwargs)

    def packed(self) -> list[Tensor]:
        """Values, codes and scales of the CPU kernels' products."""
        run = self.settle().run
        return [getattr_path(run, name) for name in packed_names(run)] if isinstance(run, GraphModule) else []

    def check_apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise NMError where packed weights would have to change."""
        if self.backend != "cpu":
            return
        given = torch.zeros(1, dtype=next((product.dtype for product in self.result.products), self.dtype or torch.float32))
        made = fn(given)
        if made.dtype != given.dtype or made.device != given.device:
            now, then = (f"{dtype_name(each.dtype)} on {each.device}" for each in (given, made))
            which = f"{self.part}, a lowered part ({self.title})," if self.part else f"this {self.title}"
            how = "cast the model and lower its parts anew" if self.part else "lower the model anew, with dtype="
            raise NMError(f"{which} is packed for {now}: for {then}, {how}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """For `to`, `half` and their like. Packed weights stay as they lie; raises NMError where they would have to change."""
        if self.backend != "cpu":
            return super(Lowered, self.settle())._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.check_apply(fn)
        packed = set(map(id, self.packed()))

        def changed(value: Tensor) -> Tensor:
            result = fn(value)
            same = result.dtype == value.dtype and (id(value) not in packed or result.stride() == value.stride())
            return result if same else value

        return super()._apply(changed, recurse)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """For `copy.deepcopy` and `torch.save`."""
        return super(Lowered, self.settle()).__reduce_ex__(protocol)

    def _autocast(self, flat: Sequence[Any]) -> str | None:
        """The kind of device for which `torch.autocast` is on and changes nothing; None where it is off.

        Raises NMError where the model, or the part, itself would compute, and answer, in another dtype.
        """
        tensors = [value for value in flat if isinstance(value, Tensor)][:1]
        dtype = autocast_of(tensors)
        if dtype is None:
            return None
        if self.part:
            raise NMError(
                f"{self.part} is a lowered part ({self.title}), which knows nothing of torch.autocast ({dtype_name(dtype)}): "
                f"leave autocast out, and lower the parts of model.to(torch.{dtype_name(dtype)}) for that dtype"
            )
        known = {self.dtype} if self.dtype is not None else {product.dtype for product in self.result.products}
        if known != {dtype}:
            own, now = " and ".join(sorted(map(dtype_name, known))), dtype_name(dtype)
            raise NMError(
                f"this {self.title} is lowered for {own}, and torch.autocast ({now}) is on around the call, where the model "
                f"would compute in {now}: leave autocast out, or lower with dtype=torch.{now}"
            )
        return tensors[0].device.type if tensors else "cpu"

    def _other_dtype(self, flat: Sequence[Any]) -> NMError | None:
        """What is wrong with a call that failed, if its inputs have another dtype than the products."""
        given = {value.dtype for value in flat if isinstance(value, Tensor) and value.is_floating_point()}
        known = {product.dtype for product in self.result.products}
        if len(given) != 1 or len(known) != 1 or given == known:
            return None
        return self._refusal(*known, *given)

    def _refusal(self, known: torch.dtype, given: torch.dtype) -> NMError:
        now, then = dtype_name(known), dtype_name(given)
        return NMError(
            f"this {self.title} is lowered for {now}, and its inputs are {then}: cast them, x.to(torch.{now}), or lower a "
            f"model of {then}; with dtype=torch.{now} for nm.lower, inputs are cast at every call"
        )

    def _is_strange(self, flat: Sequence[Any]) -> bool:
        """Whether an input has another dtype than at capture."""
        return any(dtype is not None and value.dtype is not dtype for value, dtype in zip(flat, self.captured, strict=True))

    def _refusal_of(self, data: Tensor) -> NMError | None:
        """What is wrong with the data that has come to a packed product."""
        fits = self.packed_for is None or data.dtype is self.packed_for
        return None if fits else self._refusal(self.packed_for, data.dtype)  # type: ignore[arg-type]

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def extra_repr(self) -> str:
        chosen = sum(1 for decision in self.result.decisions.values() if decision.kernel)
        return f"{self.title} on {self.backend}, {chosen} of {len(self.result.products)} products sparse"


class _Watched(Interpreter):
    """Runs a graph as it is, but for packed products whose data ``refusal`` has a word against: that is raised."""

    def __init__(self, run: nn.Module, refusal: Callable[[Tensor], NMError | None]) -> None:
        super().__init__(run)
        self.refusal = refusal

    def __call__(self, *flat: Any) -> Any:
        return self.run(*flat)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        refused = self.refusal(args[0]) if target in (LINEAR, CONV2D) else None
        if refused is not None:
            raise refused
        return super().call_function(target, args, kwargs)


def _taken(run: Any) -> tuple[torch.dtype | None, ...]:
    """The dtypes of a graph's inputs; None of what is no floating-point tensor."""
    values = [node.meta.get("val") for node in run.graph.find_nodes(op="placeholder")]
    return tuple(each.dtype if isinstance(each, Tensor) and each.is_floating_point() else None for each in values)


def relative_error(found: Any, wanted: Any) -> float:
    """The largest over all float outputs of |found - wanted| / |wanted|, in the Euclidean norm; NaN counts as infinite."""
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if not isinstance(other, Tensor) or not other.is_floating_point() or not other.numel():
            continue
        size = float(other.double().norm())
        error = float((mine.double() - other.double()).norm()) / (size or 1.0)
        worst = max(worst, error if error == error else float("inf"))
    return worst
