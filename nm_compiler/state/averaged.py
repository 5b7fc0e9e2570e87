"""A copy of a compiled model that a script averages into: masks that were averaged, and masks that nobody moved.

The mean of two masks' bits, as ``AveragedModel(use_buffers=True)`` takes it, is no mask. An average of the parameters alone,
``ema.lerp_(p, 0.01)`` for each of them, keeps the masks that it was copied with. A copy is looked at before it is evaluated,
whenever its state or its weights were written since it was looked at last; a model that is no copy never is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from nm_compiler.carrier import Carrier
from nm_compiler.errors import NMError
from nm_compiler.state.beside import learns

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


@dataclass(frozen=True, slots=True)
class Copied:
    """What is known of a copy.

    begin: its state, its weights and the progress of its scheduler when it was made, or else when it was looked at first;
    looked: its state when it was looked at last; told: whether the warning was given.
    """

    begin: tuple[Versions, Versions, Any] | None = None
    looked: Versions | None = None
    told: bool = False


def copied(carrier: Carrier) -> Copied:
    """Of a copy that has just been made."""
    return Copied((_state(carrier), _weights(carrier), carrier.progress))


def checked_copy(carrier: Carrier, known: Copied) -> Copied:
    """What is known of the copy by now. Raises NMError if its state cannot be the method's; logs that it does not move."""
    state = _state(carrier)
    weights, progress = _weights(carrier), carrier.progress
    begin = known.begin or (state, weights, progress)
    known = replace(known, begin=begin)
    if not known.told and weights != begin[1] and (state, progress) == (begin[0], begin[2]):
        open_ones = [weight.site.name for weight in carrier.weights if not carrier.method.is_settled(weight)]
        if open_ones:
            _log.warning("%s: its mask is not decided in this copy, whose weights move. %s", open_ones[0], COPY_THEM)
        known = replace(known, told=True)
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


def _state(carrier: Carrier) -> Versions:
    kept = (weight[suffix] for weight in carrier.weights for suffix in carrier.method.suffixes(weight.site))
    return tuple(-1 if value.is_inference() else value._version for value in kept if not learns(value))


def _weights(carrier: Carrier) -> Versions:
    return tuple(-1 if weight.param.is_inference() else weight.param._version for weight in carrier.weights)
