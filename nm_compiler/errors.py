"""The two kinds of trouble that have a name: the user's mistake, and a weight that cannot be sparse."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

_WAYS_OUT = {
    "include= makes it sparse": "take stem, head or routers in with include=[...]",
    "need a multiple of": "choose a pattern whose M divides the input channels",
    "excluded by": "take a glob out of exclude=[...]",
}
"""By what is said in a reason."""


class NMError(Exception):
    """A mistake the user can mend. The message names the layer, the shape and the way out.

    Nothing has been changed when it is raised: every check comes before the first write.
    """


@dataclass(frozen=True, slots=True)
class Refusal:
    """A weight that stays dense, and why. It ends up as a line of the report, never as an exception.

    where: the parameter's name; reason: in words, with the way out where there is one.

    >>> str(Refusal("conv1.weight", "3 input channels, groups need a multiple of 4"))
    'conv1.weight: 3 input channels, groups need a multiple of 4'
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def refuse_all(
    model: object, patterns: object, refusals: Collection[Refusal], shapes: Mapping[str, tuple[int, ...]]
) -> NoReturn:
    """Raise NMError where no weight can be sparse: the first reasons, and the ways out that some weight has."""
    shown = "\n  ".join(f"{each.where} {list(shapes[each.where])}: {each.reason}" for each in list(refusals)[:12])
    ways = [way for part, way in _WAYS_OUT.items() if any(part in each.reason for each in refusals)]
    out = f"\n{', or '.join(ways)}" if ways else ""
    raise NMError(f"no weight of this {type(model).__name__} can be {patterns}:\n  {shown or 'it has no weights'}{out}")
