"""The number that stands for an algorithm of the library: in the op, in a graph, and from the search.

    0                 the library's own choice
    bits 0 to 15      its configuration
    bits 16 to 23     slices of the reduction axis (split-k), 0 leaves them to the library
    bits 24 to 31     how slices are added up, 0 leaves it to the library; 1 in one kernel, 2 in two

So a plain number is a configuration, as in torch. Configuration 0 by name is that of one slice, 65536.
"""

from __future__ import annotations

from typing import NamedTuple


class Algorithm(NamedTuple):
    """What a number stands for.

    >>> Algorithm.of(Algorithm(3, split=2, mode=1).code)
    Algorithm(config=3, split=2, mode=1)
    >>> Algorithm.of(3)
    Algorithm(config=3, split=0, mode=0)
    """

    config: int = 0
    split: int = 0
    mode: int = 0

    @property
    def code(self) -> int:
        """The number that stands for it."""
        return self.config | self.split << 16 | self.mode << 24

    @classmethod
    def of(cls, code: int) -> Algorithm:
        """The algorithm that a number stands for."""
        return cls(code & 0xFFFF, code >> 16 & 0xFF, code >> 24 & 0xFF)
