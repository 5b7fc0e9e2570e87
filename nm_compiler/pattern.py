"""N:M patterns and the table of combinations that a pattern allows."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from nm_compiler.errors import NMError

MAX_M = 64
MAX_TABLE = 1820  # C(16, 4): beyond it a table of combinations costs more than the weights it describes


@dataclass(frozen=True, slots=True)
class Pattern:
    """At most ``n`` non-zeros kept of every ``m`` consecutive weights, ``1 <= n < m <= 64``.

    >>> Pattern(2, 4)
    2:4
    >>> Pattern.parse("1:16").density
    0.0625

    Raises NMError for anything else: a wrong pattern cannot be built.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not all(isinstance(k, int) and not isinstance(k, bool) for k in (self.n, self.m)):
            raise NMError(f"a pattern is two whole numbers N:M such as '2:4', not {self.n!r}:{self.m!r}")
        if self.n < 1 or self.m > MAX_M:
            raise NMError(f"pattern {self.n}:{self.m} is out of range: N:M needs 1 <= N < M <= {MAX_M}, e.g. '2:4'")
        if self.n >= self.m:
            hint = f"; did you mean '{self.m}:{self.n}'?" if self.n > self.m else f"; {self.n}:{self.m} is dense"
            raise NMError(f"pattern {self.n}:{self.m} keeps {self.n} of {self.m}, but N must be smaller than M{hint}")

    @classmethod
    def parse(cls, text: str | tuple[int, int] | Pattern) -> Pattern:
        """Read ``"2:4"``, ``(2, 4)`` or a Pattern. Raises NMError that says what a pattern looks like."""
        if isinstance(text, Pattern):
            return text
        if isinstance(text, str):
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
            if match:
                return cls(int(match[1]), int(match[2]))
        elif isinstance(text, (tuple, list)) and len(text) == 2:
            return cls(*text)
        raise NMError(f"{text!r} is not a pattern: write N:M as in '2:4' (at most 2 non-zeros of every 4), or (2, 4)")

    @property
    def combinations(self) -> int:
        """C(M, N), the number of ways to keep a full group."""
        return math.comb(self.m, self.n)

    @property
    def density(self) -> float:
        """N / M, the largest share of weights that is not zero."""
        return self.n / self.m

    @property
    def has_table(self) -> bool:
        """Whether C(M, N) is small enough (<= 1820) to write all combinations down."""
        return self.combinations <= MAX_TABLE

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    __repr__ = __str__


def combination_table(pattern: Pattern) -> Tensor:
    """All combinations of a pattern, in `itertools.combinations` order.

    Returns uint8 ``[C(M, N), M]``, 1 where the combination keeps the position. Ref: LBC, section 3.2.
    Raises NMError if C(M, N) > 1820.

    >>> combination_table(Pattern(1, 2)).tolist()
    [[1, 0], [0, 1]]
    """
    if not pattern.has_table:
        raise NMError(
            f"{pattern} has {pattern.combinations} combinations a group, a table holds at most {MAX_TABLE}; "
            "use LBC(scores='position')"
        )
    table = torch.zeros(pattern.combinations, pattern.m, dtype=torch.uint8)
    for row, kept in enumerate(itertools.combinations(range(pattern.m), pattern.n)):
        table[row, list(kept)] = 1
    return table


PatternLike = str | tuple[int, int] | Pattern
PatternSpec = PatternLike | Mapping[str, PatternLike]


@dataclass(frozen=True, slots=True)
class PatternMap:
    """Which pattern a weight gets: globs over parameter names, the first match wins.

    >>> patterns = PatternMap.parse({"layer4.*": "1:4", "*": "2:4"})
    >>> patterns.of("layer4.0.conv1.weight"), patterns.of("layer1.0.conv1.weight")
    (1:4, 2:4)
    >>> print(patterns, "|", PatternMap.parse("2:4"))
    layer4.* 1:4, * 2:4 | 2:4
    """

    rules: tuple[tuple[str, Pattern], ...]

    @classmethod
    def parse(cls, spec: PatternSpec) -> PatternMap:
        """Read one pattern for all weights, or a mapping of globs to patterns. Raises NMError."""
        if isinstance(spec, Mapping):
            if not spec:
                raise NMError("pattern={} matches no weight: add a rule such as {'*': '2:4'}")
            return cls(tuple((glob, Pattern.parse(pattern)) for glob, pattern in spec.items()))
        return cls((("*", Pattern.parse(spec)),))

    def of(self, name: str) -> Pattern | None:
        """The pattern of the parameter called ``name``, or None where no rule matches."""
        return next((pattern for glob, pattern in self.rules if fnmatchcase(name, glob)), None)

    def __str__(self) -> str:
        if [glob for glob, _ in self.rules] == ["*"]:
            return str(self.rules[0][1])
        return ", ".join(f"{glob} {pattern}" for glob, pattern in self.rules)


def matches(name: str, globs: Sequence[str]) -> str | None:
    """The first glob that matches ``name``, or None."""
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)
