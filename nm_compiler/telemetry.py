"""What masks do while a model trains, as plain numbers: how many live, flip and stay, and how far backward is from forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nm_compiler.errors import NMError
from nm_compiler.solvers.combinations import pack, unpack
from nm_compiler.state.sharding import whole
from nm_compiler.unwrapping import unwrap

Row = dict[str, Any]


class Telemetry:
    """Measure every ``every`` optimizer steps: call ``step()`` after ``scheduler.step()``, keep what it returns.

    A row is ``{"step": 100, "total": {...}, "weights": {"conv1.weight": {...}, ...}}``, plain numbers. For each weight and
    for all together (sums over weights before any division):

    retained      sum |w * F| / sum |w|
    nonzero       share of weights that the forward product uses
    flipped       share of mask entries that changed since the row before; None in the first
    live          mean number of live combinations a group, under LBC, else None
    backward_kept sum |w * B| / sum |w * F| where there is a backward mask, else None
    gradient_gap  sum ((F - B) * w)^2 / sum (F * w)^2, likewise. Ref: Bi-Mask, section 3.3

    and of each weight what `Method.numbers` gives.

    model: what `compile` returned, also inside DDP or ``torch.compile``. A row costs about as much as masking every weight
    twice, and a bit of memory for each weight between rows. ``state_dict`` and ``load_state_dict``, as `nm.save_checkpoint`
    takes them, go on counting steps and flips. Raises NMError if ``every`` is not positive.
    """

    def __init__(self, model: nn.Module, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise NMError(f"Telemetry(every={every!r}): needs a whole number of at least 1")
        self._model, self.every, self.last_step = unwrap(model), every, 0
        self._before: dict[str, Tensor] = {}

    def step(self) -> Row | None:
        """Count an optimizer step. Returns a row every ``every`` steps, None in between."""
        self.last_step += 1
        return self.measure() if self.last_step % self.every == 0 else None

    def measure(self) -> Row:
        """Measure a row now, whatever ``every`` says; flips are counted from it on."""
        rows = {weight.site.name: self._sums(weight.site.name) for weight in self._model.weights}
        lives = {weight.site.name: self._model.method.live(weight) for weight in self._model.weights}
        groups = {weight.site.name: weight.param.numel() // weight.site.pattern.m for weight in self._model.weights}
        own = {weight.site.name: self._model.method.numbers(weight) for weight in self._model.weights}
        weights = {name: _joined(name, {**_shares(sums), "live": lives[name]}, own[name]) for name, sums in rows.items()}
        counted = [(live, groups[name]) for name, live in lives.items() if live is not None]
        mean = sum(live * size for live, size in counted) / sum(size for _, size in counted) if counted else None
        total = {**_shares(_added(list(rows.values()))), "live": mean}
        return {"step": self.last_step, "total": total, "weights": weights}

    def state_dict(self) -> dict[str, Any]:
        """The steps so far, and by weight a bit for each entry that the last row saw masked or not."""
        return {"last_step": self.last_step, "before": dict(self._before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Raises NMError, nothing changed, if it is of another model."""
        missing = {"last_step", "before"} - set(state_dict)
        if missing:
            raise NMError(f"this is not a Telemetry state_dict: {', '.join(sorted(missing))} missing")
        params = {weight.site.name: weight.param for weight in self._model.weights}
        for name, bits in state_dict["before"].items():
            if name not in params or bits.numel() != -(-params[name].numel() // 8):
                here = f"has shape {list(params[name].shape)}" if name in params else "is not sparse"
                raise NMError(f"this Telemetry state_dict is of another model: {name} {here} in this one")
        self._before = {name: bits.to(params[name].device) for name, bits in state_dict["before"].items()}
        self.last_step = state_dict["last_step"]

    def _sums(self, name: str) -> dict[str, float]:
        """All that is needed of a weight, in one transfer from its device. NaN stands for what there is not."""
        forward, backward = self._model.masked(name)
        weight = whole(self._model.origin.get_parameter(name).detach())
        mask, missing = forward != 0, weight.new_tensor(torch.nan, dtype=torch.float64)
        before = self._before.get(name)
        self._before[name] = pack(mask.flatten())
        flipped = missing if before is None else (unpack(before, mask.numel()) != mask.flatten()).sum()
        behind = [] if backward is None else [_size(backward), _square(forward - backward)]
        numbers = [_size(weight), _size(forward), _square(forward), mask.sum(), flipped, *(behind or [missing, missing])]
        found = torch.stack([number.double() for number in numbers]).tolist()
        return dict(zip(_SUMS, [*found, float(weight.numel())], strict=True))


def flat(row: Row) -> dict[str, float]:
    """A row of `Telemetry` as ``{"total/retained": .., "conv1.weight/flipped": ..}``, without what is None.

    For TensorBoard: ``for key, value in flat(row).items(): writer.add_scalar(key, value, row["step"])``; for CSV a
    `csv.DictWriter`; for other loggers ``log(flat(row), step=row["step"])``.
    """
    found = {f"{name}/{key}": value for name, values in named(row).items() for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}


def named(row: Row) -> dict[str, Mapping[str, float | None]]:
    """The numbers of a row by what they are of: ``total`` and the weights; of one of several modules ``generator.total``."""
    module = row.get("module")
    return {f"{module}.total" if module else "total": row["total"], **row["weights"]}


_SUMS = ("magnitude", "kept", "kept_square", "used", "flipped", "backward", "gap", "size")


def _joined(name: str, row: dict[str, float | None], own: Mapping[str, float]) -> dict[str, float | None]:
    """A weight's numbers, and those of its method. Raises NMError where one would hide another."""
    twice = sorted(row.keys() & own.keys())
    if twice:
        raise NMError(
            f"numbers() of the method gives {', '.join(map(repr, twice))} for {name}, which every row has: rename it"
        )
    return {**row, **own}


def _size(values: Tensor) -> Tensor:
    return values.abs().sum(dtype=torch.float64)


def _square(values: Tensor) -> Tensor:
    return values.double().square().sum()


def _added(rows: list[dict[str, float]]) -> dict[str, float]:
    """Sums over weights; of the backward ones over those that have a backward mask, and their forward beside them."""
    total = {key: sum(row[key] for row in rows) for key in _SUMS}
    both = [row for row in rows if row["backward"] == row["backward"]]
    if both:
        total |= {key: sum(row[key] for row in both) for key in ("backward", "gap")}
    total["forward_of_both"] = sum(row["kept"] for row in both)
    total["square_of_both"] = sum(row["kept_square"] for row in both)
    return total


def _shares(sums: dict[str, float]) -> dict[str, float | None]:
    def share(part: float, whole: float) -> float | None:
        return None if part != part else part / whole if whole else 0.0

    return {
        "retained": share(sums["kept"], sums["magnitude"]),
        "nonzero": share(sums["used"], sums["size"]),
        "flipped": share(sums["flipped"], sums["size"]),
        "backward_kept": share(sums["backward"], sums.get("forward_of_both", sums["kept"])),
        "gradient_gap": share(sums["gap"], sums.get("square_of_both", sums["kept_square"])),
    }
