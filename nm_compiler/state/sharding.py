"""Weights and state in shards, as FSDP2's `fully_shard` leaves them between calls: gathered to be read, cut to be written.

During a call FSDP2 puts whole tensors in the place of shards, so fragments and masks never see one. Everything else, the
scheduler's step, reports and checks, goes through here. To gather is a collective: every rank has to ask.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError

if TYPE_CHECKING:
    from nm_compiler.sites.plan import Site


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: a part of it on every rank."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, without gradient if it had to be gathered; a tensor in one piece is given back as it is."""
    if not is_sharded(tensor):
        return tensor
    gathered: Any = tensor.detach()
    full: Tensor = gathered.full_tensor()
    return full


def cut_like(value: Tensor, model: Tensor) -> Tensor:
    """``value``, the same on all ranks, in shards as ``model`` is; itself where that is in one piece."""
    if not is_sharded(model) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    its: Any = model
    return distribute_tensor(value, its.device_mesh, its.placements, src_data_rank=None)


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, whole and the same on all ranks, into ``target``: each rank its shard."""
    if is_sharded(target):
        mine, here = (each.to_local() for each in (cut_like(value, target), target))  # type: ignore[attr-defined]
        here.copy_(mine)
    else:
        target.copy_(value)


def parts(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    made = sys.modules.get("torch.distributed.fsdp")
    return [] if made is None else [module for module in model.modules() if isinstance(module, made.FSDPModule)]


def in_shards(model: nn.Module, name: str) -> bool:
    """Whether `fully_shard` took the parameter ``name``, also while a call has it whole."""
    made, module = parts(model), model
    path = [module]
    for atom in name.split(".")[:-1]:
        module = module.get_submodule(atom)
        path.append(module)
    return any(module is each for module in path for each in made)


def reshard(model: nn.Module) -> None:
    """Put the shards back in the place of what the last call left whole, as an evaluation leaves FSDP2's root."""
    for module in parts(model):
        module.reshard()


def parallel(name: str, weight: Tensor, site: Site | None) -> NMError:
    """What to say of a parameter that a tensor-parallel plan has cut; site: of one with groups, and what becomes of them."""
    its: Any = weight
    cut = [(each.dim, its.device_mesh.size(axis)) for axis, each in enumerate(its.placements) if each.is_shard()]
    how = "graphs over parts are not rewritten"
    if site is not None:
        across = next((ranks for axis, ranks in cut if axis == site.in_axis), 1)
        inputs, m = site.shape[site.in_axis], site.pattern.m
        along = f"along its {inputs} inputs over {across} ranks" if across > 1 else "not along its inputs"
        groups = f"through groups of {m}" if inputs % (across * m) else f"groups of {m} stay whole"
        how = f"cut {along}, {groups}; no mask is made of parts"
    return NMError(
        f"{name} of shape {list(weight.shape)} is tensor-parallel, {list(map(str, its.placements))}: {how}. "
        "Leave parallelize_module out and shard the model with fully_shard (FSDP2)"
    )


def sharded_freeze(site: Site) -> NMError:
    """What to say to nm.freeze under FSDP2, which would go on to hold state that is gone."""
    return NMError(
        f"{site.name} of shape {list(site.shape)} is in shards, and nm.freeze writes whole weights: save with "
        "torch.distributed.checkpoint, load that in one process into nm.compile(model) of an unsharded model that has been "
        "called once, and nm.freeze it"
    )
