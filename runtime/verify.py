"""Which weights satisfy a pattern, along which axis: of a model, a state_dict or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern, PatternMap, PatternSpec, matches
from nm_compiler.runtime.native.packing import LANES
from nm_compiler.runtime.tensors_of import masked_elsewhere, tensors_of
from nm_compiler.solvers.check import nonzeros, worst_group
from nm_compiler.state.beside import RECIPE, read_recipe
from nm_compiler.state.sharding import whole
from nm_compiler.wording import several

_CODES, _BESIDE_CODES = "_codes", ("_values", "_scales")


@dataclass(frozen=True, slots=True)
class Checked:
    """One weight: the axes along which it satisfies its pattern (None: no rule names it), and its share of non-zeros."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    nonzero: float
    pattern: Pattern | None


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. ``print`` it; ``satisfied`` maps the names of sparse weights to their axes.

    training: the method in whose training a checkpoint was written, whose weights have their zeros only after `freeze`.
    part_of: weights of a part of a model that trains, which are dense there: the masks belong to the whole model.
    packed: weights that lie as the CPU kernels read them, as in the state_dict of a lowered model: not looked at.
    """

    pattern: PatternMap
    weights: tuple[Checked, ...]
    training: str | None = None
    part_of: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()

    @property
    def satisfied(self) -> dict[str, tuple[int, ...]]:
        """Weights that satisfy the pattern, with the axes: 1 is the input axis of linears and convolutions.

        Of experts it is 1 or 2, for ``[expert, in, out]`` or ``[expert, out, in]``. In an ONNX file it is the axis along
        which the product that reads the weight reduces, and no other: 1 of a Conv, 0 of a MatMul's ``[K, N]``.
        """
        return {weight.name: weight.axes for weight in self.weights if weight.axes}

    def __str__(self) -> str:
        if not self.weights and not self.packed:
            return "Nothing to check: no floating-point tensor of two or more axes is here."
        shapes = ["x".join(map(str, weight.shape)) for weight in self.weights]
        name, size = max((len(weight.name) for weight in self.weights), default=0), max(map(len, shapes), default=0)
        lines = []
        for weight, shape in zip(self.weights, shapes, strict=True):
            along = f"yes, ax{'e' if len(weight.axes) > 1 else 'i'}s {' and '.join(map(str, weight.axes))}"
            asked = f"{weight.pattern}: {along if weight.axes else 'no'}" if weight.pattern else "no pattern"
            lines.append(f"{weight.name:<{name}}  {shape:<{size}}  {weight.nonzero:6.1%} non-zero  {asked}")
        lines.append(f"{len(self.satisfied)} of {len(self.weights)} weights are {self.pattern}.")
        if self.training:
            lines.append(f"Written while it trained with {self.training}: nm.freeze(model), then save what it returns.")
        if self.part_of:
            told = "part of a model that nm.compile returned, whose masks are not in these values: verify that one"
            lines.append(f"{several(self.part_of, 3)}: {told}.")
        if self.packed:
            told = "packed by nm.lower, which keeps no zeros to look at: verify the model that was lowered"
            lines.append(f"{several(self.packed, 3)}: {told}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        rows = [
            {
                "name": w.name, "shape": list(w.shape), "axes": list(w.axes), "nonzero": w.nonzero,
                "pattern": w.pattern and str(w.pattern),
            }
            for w in self.weights
        ]  # fmt: skip
        return {"pattern": str(self.pattern), "weights": rows, "satisfied": len(self.satisfied)}


def verify(target: nn.Module | Mapping[str, Any] | str | Path, pattern: PatternSpec = "2:4") -> Verification:
    """Check every floating or quantised tensor of two or more axes for at most N non-zeros in each group of M.

    target: a module (a compiled one with its masks applied), a state_dict, a checkpoint folder with ``.safetensors`` shards,
    or the path of a ``.safetensors`` file (both read a tensor at a time), of a ``.pt``, ``.pth`` or ``.bin`` file (loaded with
    ``weights_only``), or of an ``.onnx`` file, of which only what Conv, MatMul and Gemm multiply with is checked, along the
    axis that they reduce. A weight that is zero altogether satisfies any pattern; its share of non-zeros tells.
    pattern: as in `nm_compiler.compile`, also ``{"layer4.*": "1:4", "*": "2:4"}``; a weight without a rule satisfies nothing.
    Weights that are sharded are gathered one at a time, so every rank has to call it.
    Raises NMError for a file that is missing, truncated or of another kind, and for a glob that matches no weight.
    """
    found = examine(target, pattern)
    for glob, own in found.pattern.rules:
        if glob != "*" and not any(matches(weight.name, (glob,)) for weight in found.weights):
            known = ", ".join(weight.name for weight in found.weights[:6]) + (", ..." if len(found.weights) > 6 else "")
            raise NMError(f"pattern={{{glob!r}: '{own}'}} matches no weight; globs run over names such as {known or '-'}")
    return found


def examine(target: nn.Module | Mapping[str, Any] | str | Path, pattern: PatternSpec) -> Verification:
    """`verify` where rules may be about weights that are elsewhere, as those of one shard are."""
    wanted = PatternMap.parse(pattern)
    if isinstance(target, (str, Path)) and Path(target).suffix == ".onnx":
        return Verification(wanted, _of_onnx(Path(target), wanted))
    found, recipes, packed = list[Checked](), dict[str, Any](), list[str]()
    for name, tensor in tensors_of(target):
        if name.rpartition(".")[2] == RECIPE and not tensor.is_meta:
            recipes[name.removesuffix(RECIPE)] = read_recipe(tensor)
        if _is_codes(name, tensor):
            packed.append(name.removesuffix(_CODES))
        if tensor.ndim < 2 or not tensor.dtype.is_floating_point or tensor.is_meta:
            continue
        tensor = whole(tensor)
        own = wanted.of(name)
        axes = tuple(axis for axis in range(tensor.ndim) if own is not None and _holds(tensor, own, axis))
        nonzero = nonzeros(tensor) / max(1, tensor.numel())
        found.append(Checked(name, tuple(tensor.shape), axes, nonzero, own))
    beside = {f"{prefix}{name}_scores" for prefix, recipe in recipes.items() for name in recipe["weights"]}
    beside |= {f"{name}{part}" for name in packed for part in _BESIDE_CODES}
    weights = tuple(weight for weight in found if weight.name not in beside)
    training = next((recipe["method"] for recipe in recipes.values()), None)
    return Verification(wanted, weights, training, tuple(masked_elsewhere(target)), tuple(packed))


def _is_codes(name: str, tensor: Tensor) -> bool:
    """Whether it says where a packed weight keeps its values (`nm_compiler.passes.lower_cpu` gives it that name)."""
    return name.endswith(_CODES) and tensor.dtype == torch.int32 and tensor.ndim == 4 and tensor.shape[-1] == LANES


def _holds(tensor: Tensor, pattern: Pattern, axis: int) -> bool:
    size = tensor.shape[axis]
    return size > 0 and size % pattern.m == 0 and worst_group(tensor, pattern.m, axis) <= pattern.n


def _of_onnx(path: Path, wanted: PatternMap) -> tuple[Checked, ...]:
    """A line for each initialiser; the axes of one that several products read count if it is N:M for all of them."""
    from nm_compiler.runtime.onnx_files.reading import operands

    found: dict[str, list[Checked]] = {}
    for operand in operands(path):
        nonzero, axis, own = torch.from_numpy(operand.value != 0), operand.axis, wanted.of(operand.name)
        holds = own is not None and _holds(nonzero, own, axis)
        share = float(nonzero.sum()) / max(1, nonzero.numel())
        one = Checked(operand.name, tuple(nonzero.shape), (axis,) if holds else (), share, own)
        found.setdefault(operand.name, []).append(one)
    rows = []
    for name, uses in found.items():
        axes = sorted({axis for use in uses for axis in use.axes}) if all(use.axes for use in uses) else ()
        rows.append(Checked(name, uses[0].shape, tuple(axes), sum(use.nonzero for use in uses) / len(uses), uses[0].pattern))
    return tuple(rows)
