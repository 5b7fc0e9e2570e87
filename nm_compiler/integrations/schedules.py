"""A scheduler, and telemetry, for every compiled module inside a model: what the callbacks of all trainers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.optim import learned_state
from nm_compiler.scheduler import SparsityScheduler
from nm_compiler.telemetry import Row, Telemetry
from nm_compiler.unwrapping import is_compiled, unwrap

Write = Callable[[Row], object]


@dataclass(frozen=True)
class Tracked:
    """One compiled module: where it is (``""`` is the model itself), its scheduler, its telemetry.

    optimizer: the one that moves its weights, where it is known.
    """

    name: str
    scheduler: SparsityScheduler
    telemetry: Telemetry | None
    optimizer: torch.optim.Optimizer | None


class Schedules:
    """All compiled modules of a model, in step.

    model: anything that holds what `nm.compile` returned, at any depth; total_steps: optimizer steps of the training, or
    those of each compiled module by its name (``{"generator": 1000, "critic": 5000}``);
    optimizers: those of the training, if known: each module takes the one that moves its weights;
    every, write: a `Telemetry` row goes to ``write`` every so many steps, named after its module where there are several; of
    several processes rank 0 writes.
    Raises NMError if nothing in the model was compiled, or if ``total_steps`` names other modules.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | Mapping[str, int],
        *,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        every: int | None = None,
        write: Write | None = None,
    ) -> None:
        found = {name: module for name, module in model.named_modules() if is_compiled(module)}
        if not found:
            raise NMError(
                f"{type(model).__name__} holds nothing that nm.compile returned: compile the model, or a part of it "
                "(self.net = nm.compile(net, inputs)), before the trainer gets it"
            )
        if (every is None) != (write is None):
            raise NMError("telemetry needs both: every= (steps between rows) and write= (what takes a row)")
        lengths = total_steps if isinstance(total_steps, Mapping) else dict.fromkeys(found, total_steps)
        if set(lengths) != set(found):
            raise NMError(f"total_steps= names {sorted(lengths)}, the compiled modules are {sorted(found)}")
        self._write = write
        self.tracked = tuple(
            Tracked(
                name,
                SparsityScheduler(module, lengths[name], optimizer=_given(module, optimizers)),
                None if every is None else Telemetry(module, every),
                _moving(module, optimizers),
            )
            for name, module in found.items()
        )

    def step(self) -> None:
        """Count one optimizer step of all, and do what falls due."""
        for each in self.tracked:
            self.step_one(each)

    def step_one(self, each: Tracked) -> None:
        """Count one optimizer step of one of them."""
        each.scheduler.step()
        row = each.telemetry.step() if each.telemetry else None  # on every rank, which may have to gather
        if row is not None and self._write is not None and not _rank():
            self._write(self._named(each.name, row))

    def _named(self, name: str, row: Row) -> Row:
        if len(self.tracked) == 1:
            return row
        weights = {f"{name}.{key}" if name else key: value for key, value in row["weights"].items()}
        return {"step": row["step"], "module": name, "total": row["total"], "weights": weights}

    def state_dict(self) -> dict[str, Any]:
        """Of every scheduler, by the name of its module."""
        return {each.name: each.scheduler.state_dict() for each in self.tracked}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where it was taken. Raises NMError if it belongs to other modules or another schedule."""
        names = [each.name for each in self.tracked]
        if sorted(state_dict) != sorted(names):
            raise NMError(f"saved for the compiled modules {sorted(state_dict)}, this model has {sorted(names)}")
        for each in self.tracked:
            each.scheduler.load_state_dict(state_dict[each.name])
            self._count(each)

    def jump(self, step: int) -> None:
        """Go on after ``step`` optimizer steps, for trainers that only remember that number."""
        for each in self.tracked:
            each.scheduler.load_state_dict({**each.scheduler.state_dict(), "last_step": step})
            self._count(each)

    @staticmethod
    def _count(each: Tracked) -> None:
        if each.telemetry is not None:
            each.telemetry.last_step = each.scheduler.last_step


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _moving(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer | None:
    """The optimizer that moves the weights of a compiled module; that of the first, where there are several."""
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return next((owners[id(weight.param)] for weight in unwrap(module).weights if id(weight.param) in owners), None)


def _given(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer | None:
    """What a scheduler is given: the optimizer that moves the weights, unless their scores have another one."""
    one = _moving(module, optimizers)
    others = {id(p) for each in optimizers if each is not one for group in each.param_groups for p in group["params"]}
    return None if any(id(value) in others for value in learned_state(unwrap(module)).values()) else one
