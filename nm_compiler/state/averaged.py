"""A copy of a compiled model that a script averages into: masks that were averaged, and masks that nobody moved.

The mean of two masks' bits, as ``AveragedModel(use_buffers=True)`` takes it, is no mask. An average of the parameters alone,
``ema.lerp_(p, 0.01)`` for each of them, keeps the masks that it was copied with. A copy is looked at before it is evaluated,
whenever its state or its weights were written since it was looked at last; a model that is no copy never is. Target networks
are such copies, called without gradients in training mode, and what is written through ``.data``, as scripts do it there
(``target.data.copy_(tau * p.data + (1 - tau) * target.data)``), is not counted: after 1, 2, 4, .. calls values are compared.
A model that was made anew and has loaded the state of another, which no scheduler steps, is looked at as a copy is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nm_compiler.carrier import Carrier
from nm_compiler.errors import NMError
from nm_compiler.state.beside import learns
from nm_compiler.state.sharding import is_sharded

_log = logging.getLogger(__name__)

WAY_OUT = (
    "AveragedModel(use_buffers=True) averages whole numbers too: set averaged.use_buffers = False and call "
    "averaged.update_parameters(sparse) once more, which then copies them"
)
COPY_THEM = (
    "An average that leaves out what is not a float has the masks that it was copied with: copy those values of the "
    "state_dict() of the model that trains into its own"
)

Versions = tuple[int, ...]  # how often each of several tensors had been written
Values = tuple[float, ...]  # some numbers of several tensors


@dataclass(frozen=True, slots=True)
class Copied:
    """What is known of a copy.

    begin: its state, its weights and the progress of its scheduler when it was made, or else when it was looked at first;
    looked: its state when it was looked at last; told: whether the warning was given; of: what it is a copy of;
    loaded: whether it is none, but was made anew and has loaded state; made_at: what was counted when it was copied.
    calls: how many there were; seen: numbers of its masks, of those of ``of`` and of its weights when they were compared last.
    """

    begin: tuple[Versions, Versions, Any] | None = None
    looked: Versions | None = None
    told: bool = False
    of: weakref.ReferenceType[Carrier] | None = None
    loaded: bool = False
    made_at: tuple[int, int] | None = None
    calls: int = 0
    seen: tuple[Values, Values, Values] | None = None


def copied(carrier: Carrier, of: Carrier) -> Copied:
    """Of a copy that has just been made."""
    return Copied((_state(carrier), _weights(carrier), carrier.progress), of=weakref.ref(of), made_at=of.progress)


def loaded(carrier: Carrier) -> Copied | None:
    """Of a model that loads state: as a copy, where no scheduler was made for it, as of a target network that is made anew."""
    known: Copied | None = carrier.copy_known
    if known is None:
        return Copied(loaded=True) if carrier.progress is None else None
    return replace(known, begin=None)  # it is of another time from here on


def checked_copy(carrier: Carrier, known: Copied) -> Copied:
    """What is known of the copy by now. Raises NMError if its state cannot be the method's; logs that it does not move."""
    if known.loaded and carrier.progress is not None:  # it goes on from there by itself
        return known
    state = _state(carrier)
    weights, progress = _weights(carrier), carrier.progress
    begin = known.begin or (state, weights, progress)
    known = _compared(carrier, replace(known, begin=begin))
    if not known.told and weights != begin[1] and (state, progress) == (begin[0], begin[2]):
        known = _told(carrier, known)
    if state == known.looked:
        return known
    for weight in carrier.weights:
        values = {suffix: weight.read(suffix) for suffix in carrier.method.suffixes(weight.site)}
        if set(values) <= {"order"}:  # of backward masks, which no evaluation asks for
            continue
        problem = carrier.method.problem(weight.site, values)
        if problem is not None:
            raise NMError(f"{weight.site.name} of shape {list(weight.site.shape)}: {problem}. {WAY_OUT}")
    return replace(known, looked=state)


def _told(carrier: Carrier, known: Copied) -> Copied:
    open_ones = [weight.site.name for weight in carrier.weights if not carrier.method.is_settled(weight)]
    if open_ones:
        _log.warning("%s: its mask is not decided in this copy, whose weights move. %s", open_ones[0], COPY_THEM)
    return replace(known, told=True)


def _compared(carrier: Carrier, known: Copied) -> Copied:
    """Tell, at some calls, that weights have moved since the last of them, and masks are not those of that time even."""
    known = replace(known, calls=known.calls + 1)
    origin = known.of() if known.of is not None else None
    trains = known.begin is not None and carrier.progress != known.begin[2]  # with a scheduler of its own
    if known.told or trains or known.calls & (known.calls - 1) or origin is None:
        return known
    if any(is_sharded(weight.param) for weight in carrier.weights):
        return known
    masks, theirs, weights = _values(_kept(carrier)), _values(_kept(origin)), _values(w.param for w in carrier.weights)
    before, known = known.seen, replace(known, seen=(masks, theirs, weights))
    if before is not None and masks == before[0] != before[1] and weights != before[2]:
        return _told(carrier, known)
    return known


def _kept(carrier: Carrier) -> Iterator[Tensor]:
    """The masks: what only grows smaller, so that sums tell it."""
    for weight in carrier.weights:
        yield from (weight[s] for s in carrier.method.suffixes(weight.site) if s != "order" and not learns(weight[s]))


@torch.no_grad()
def _values(tensors: Iterable[Tensor]) -> Values:
    """The sum of each of whole numbers, and of some numbers of each of the others."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors if not tensor.is_meta]
    some = [each[:: max(1, len(each) // 64)] if each.is_floating_point() else each for each in flat]
    return tuple(torch.stack([each.double().sum() for each in some]).tolist()) if some else ()


def _state(carrier: Carrier) -> Versions:
    kept = (weight[suffix] for weight in carrier.weights for suffix in carrier.method.suffixes(weight.site))
    return tuple(-1 if value.is_inference() else value._version for value in kept if not learns(value))


def _weights(carrier: Carrier) -> Versions:
    return tuple(-1 if weight.param.is_inference() else weight.param._version for weight in carrier.weights)
