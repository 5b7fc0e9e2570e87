"""FSDP2: what has to be a parameter so that `fully_shard` cuts it with its weight."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from nm_compiler.carrier import carrier_of
from nm_compiler.errors import NMError
from nm_compiler.state.sharding import parts

M = TypeVar("M", bound=nn.Module)


def state_as_parameters(model: M) -> M:
    """Make live sets, masks and orders parameters without gradient, for `fully_shard` to shard them with their weights.

        model = nm.compile(Net(), method=nm.LBC())
        model(batch)  # the graph decides which weights are N:M
        state_as_parameters(model)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)

    Without it they are buffers, which FSDP2 leaves whole on every rank. Names and values stay as they are, so checkpoints of
    both fit each other. Not for `torch.optim.swa_utils.AveragedModel`, which would average whole numbers.

    model: what ``nm.compile(model)`` without example inputs returned, after its first call; it is given back.
    Raises NMError, nothing changed, for other models, before the first call, and after `fully_shard`.
    """
    carrier = carrier_of(model)
    if carrier is None:
        raise NMError(
            f"{type(model).__name__} is not a live model: FSDP2 needs what nm.compile(model) without example inputs returns"
        )
    carrier.ready()
    if parts(model):
        raise NMError(
            f"fully_shard was called on this {type(model).__name__} already: state_as_parameters(model) comes before it"
        )
    for weight in carrier.weights:
        for suffix in carrier.method.suffixes(weight.site):
            leaf, value = f"{weight.leaf}_{suffix}", weight[suffix]
            if leaf in weight.owner._buffers and value.ndim and not value.is_floating_point():
                del weight.owner._buffers[leaf]
                weight.owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    carrier.begin()
    return model
