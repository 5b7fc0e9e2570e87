"""The two kinds of trouble that have a name: the user's mistake, and a weight that cannot be sparse."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn


class WayOut(Enum):
    """An option of `nm.compile` that makes a refused weight N:M, and what to do with it. Errors list them in this order."""

    INCLUDE = "take stem, head or routers in with include=[...]"
    PATTERN = "choose a pattern whose M divides the input channels"
    EXCLUDE = "take a glob out of exclude=[...]"


class NMError(Exception):
    """A mistake the user can mend. The message names the layer, the shape and the way out.

    Nothing has been changed when it is raised: every check comes before the first write.
    """


@dataclass(frozen=True, slots=True)
class Refusal:
    """A weight that stays dense, and why. It ends up as a line of the report, never as an exception.

    where: the parameter's name; reason: in words, with the way out where there is one; way_out: the option of `nm.compile`
    that would make it N:M, if one would. An error that no weight can be N:M lists each of these once.

    >>> str(Refusal("conv1.weight", "3 input channels, groups need a multiple of 4"))
    'conv1.weight: 3 input channels, groups need a multiple of 4'
    """

    where: str
    reason: str
    way_out: WayOut | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def refuse_all(
    model: object, patterns: object, refusals: Collection[Refusal], shapes: Mapping[str, tuple[int, ...]]
) -> NoReturn:
    """Raise NMError where no weight can be sparse: the first reasons, and the ways out that some weight has."""
    shown = "\n  ".join(f"{each.where} {list(shapes[each.where])}: {each.reason}" for each in list(refusals)[:12])
    ways = [way.value for way in WayOut if any(each.way_out is way for each in refusals)]
    out = f"\n{', or '.join(ways)}" if ways else ""
    raise NMError(f"no weight of this {type(model).__name__} can be {patterns}:\n  {shown or 'it has no weights'}{out}")
