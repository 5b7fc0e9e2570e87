"""Orders of coupled channels for a checkpoint: axes from the model on the meta device, weights read a class at a time.

What is coupled comes from the captured graph, as in `nm_compiler.permute`, so the pruned checkpoint is one of a model that
computes what the dense one does but for its zeros. A class is left as it is where its search would need more memory than
``limit``, or where it runs through a tensor that the checkpoint does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nm_compiler.axes.coordinates import runs
from nm_compiler.axes.reorder import needs_of, reorder
from nm_compiler.axes.result import Axes, AxisClass, leaves
from nm_compiler.axes.result import Axis as Expression
from nm_compiler.axes.search import search_orders
from nm_compiler.capture.export import capture_mode
from nm_compiler.capture.exported import Exported
from nm_compiler.capture.preparing import check_model
from nm_compiler.errors import NMError
from nm_compiler.permuting import coupled
from nm_compiler.sites.plan import Plan, Site
from nm_compiler.solvers.search_matrix import memory_needed
from nm_compiler.streaming.folder import Folder
from nm_compiler.streaming.parts import read_whole
from nm_compiler.streaming.tensor_file import FLOATING
from nm_compiler.streaming.whole import whole

ORDERS = "nm_orders.st"  # not .safetensors: some loaders take every such file for a shard
_FLOOR = 1 << 30  # bytes that a search may always take
_TOKENS = (2, 16)

Worth = Callable[[Site, Tensor], Tensor]


@dataclass(frozen=True)
class Ordering:
    """Orders by class, int64 ``[*rows, size]``, and what they mean for a tensor. notes: lines for the user."""

    orders: Mapping[str, Tensor]
    layouts: Mapping[str, Sequence[Expression]]
    needs: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def moves(self, name: str) -> bool:
        """Whether anything of a tensor changes its place."""
        return any(leaf.name in self.orders for axis in self.layouts.get(name, ()) for leaf in leaves(axis))

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor, or another of its shape, in the new order."""
        return reorder(tensor, self.layouts[name], self.orders, self.needs).contiguous()


class _OnDisk(nn.Module):
    """The weights of a folder where a model's are asked for."""

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self._homes, self._entries = folder.homes, folder.entries

    def get_parameter(self, target: str) -> nn.Parameter:
        return nn.Parameter(read_whole(self._homes[target].path, self._entries[target]), requires_grad=False)


def find_axes(model: nn.Module | str) -> tuple[nn.Module, Axes]:
    """The coupled axes of a meta model of token ids. Raises NMError where there is no model, or it cannot be captured."""
    way = "leave --permute out, or nm.permute the model in memory first"
    if isinstance(model, str):
        raise NMError(f"permute needs the graph of the model, and there is none: {model}; {way}")
    given = getattr(model, "dummy_inputs", None)
    inputs = {"input_ids": torch.zeros(_TOKENS, dtype=torch.int64)}
    if isinstance(given, Mapping) and set(given) - {"input_ids"}:
        inputs = {str(name): value for name, value in given.items() if isinstance(value, Tensor)}
    try:
        check_model(model, "permute")
        empty = {name: value.to("meta") for name, value in inputs.items()}
        return model, coupled(model, {False: Exported(*capture_mode(model, (), empty, training=False))})
    except NMError as error:
        raise NMError(f"permute: the {type(model).__name__} of config.json cannot be captured; {way}. {error}") from error


def find_orders(
    folder: Folder, plan: Plan, model: nn.Module, axes: Axes, worth: Worth, *, seed: int, budget_s: float | None
) -> Ordering:  # fmt: skip
    """Search every free class that fits into memory, one after the other. Raises NMError."""
    layouts = _layouts(folder, model, axes)
    held = {name: layout for name, layout in axes.state.items() if name in folder.entries}
    limit = max(_FLOOR, 2 * largest_layer(folder))
    sites, classes, notes = {site.name: site for site in plan.sites}, list[AxisClass](), list[str]()
    for each in axes.classes:
        why = each.pinned or _stays(each, axes, folder, sites, limit)
        classes.append(replace(each, pinned=why) if why else each)
        if why and each.free:
            notes.append(f"kept its order: {each.name} of {each.size} channels: {why}")
    restricted = replace(axes, classes=tuple(classes))
    known = replace(plan, sites=tuple(site for site in plan.sites if site.name in held))
    orders, gains = search_orders(
        _OnDisk(folder), restricted, known, seed=seed, budget_s=budget_s, importance=worth, workers=1
    )  # fmt: skip
    return Ordering(orders, layouts, needs_of(axes), (*(f"permuted {gain}" for gain in gains), *notes))


def save_orders(ordering: Ordering, out: Path) -> None:
    """Write the orders into ``out``, so that a run that goes on uses the same. Raises NMError."""
    from safetensors.torch import save

    with whole(out / ORDERS) as file:
        file.write(save({name: order.contiguous() for name, order in ordering.orders.items()}))


def load_orders(folder: Folder, model: nn.Module, axes: Axes, out: Path) -> Ordering | None:
    """What `save_orders` wrote, None where it did not. Raises NMError for a file that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not (out / ORDERS).exists():
        return None
    try:
        orders: dict[str, Tensor] = load((out / ORDERS).read_bytes())
    except (OSError, SafetensorError) as error:
        raise NMError(f"{out / ORDERS} cannot be read ({error}): remove {out}, or give a new folder") from error
    return Ordering(orders, _layouts(folder, model, axes), needs_of(axes), ("orders of the run before",))


def search_bytes(channels: int, rows: int) -> int:
    """Memory that the search of a class takes, the importance of its weights in float32 included."""
    return memory_needed(channels, rows) + 4 * rows * channels


def largest_layer(folder: Folder) -> int:
    """Bytes of the tensors that share the number of a layer in their name; of all tensors where there are no numbers."""
    sizes: dict[str, int] = {}
    for name, entry in folder.entries.items():
        numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        sizes[numbered[0] if numbered else ""] = sizes.get(numbered[0] if numbered else "", 0) + entry.nbytes
    return max(size for key, size in sizes.items() if key or len(sizes) == 1)


def _layouts(folder: Folder, model: nn.Module, axes: Axes) -> dict[str, Sequence[Expression]]:
    """Of every tensor of the folder that the graph knows, by any of its names."""
    known: dict[int, Sequence[Expression]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name in axes.state:
            known[id(tensor)] = axes.state[name]
    return {name: known[id(tensor)] for name, tensor in named if id(tensor) in known and name in folder.entries}


def _stays(
    each: AxisClass, axes: Axes, folder: Folder, sites: Mapping[str, Site], limit: int
) -> str | None:  # fmt: skip
    """Why a free class is not searched, or None."""
    for member in each.members:
        entry = folder.entries.get(member.name)
        if entry is None:
            return f"it runs through {member.name}, which the checkpoint does not hold"
        if entry.dtype not in FLOATING:
            return f"it runs through {member.name}, which is {entry.dtype}"
        sizes = tuple(axis.size for axis in axes.state[member.name])
        if entry.shape != sizes:
            return f"{member.name} has shape {list(entry.shape)} in the checkpoint, {list(sizes)} in the model"
    needed = max((search_bytes(each.size, rows) for rows in _rows(each, axes, sites)), default=0)
    if needed > limit:
        return f"its search would take {needed / 1e9:.1f} GB, more than {limit / 1e9:.1f} GB (two layers, or a little)"
    return None


def _rows(each: AxisClass, axes: Axes, sites: Mapping[str, Site]) -> list[int]:
    """For every row of a class's order, the rows of the matrix that is searched; none where no group depends on it."""
    found: dict[int, int] = {}
    for member in dict.fromkeys(each.of("in")):
        site = sites.get(member.name)
        if site is None:
            continue
        for run in runs(axes.state[member.name][member.axis], each.name, each.needs, each.rows):
            found[run.row] = found.get(run.row, 0) + site.out
    return list(found.values())
