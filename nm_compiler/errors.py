"""The two kinds of trouble that have a name: the user's mistake, and a weight that cannot be sparse."""

from __future__ import annotations

from dataclasses import dataclass


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
