"""How many entries of a group are left while a schedule takes them away, in whole numbers: a float ceil is off at times.

    left = last + ceil((entries - last) (1 - tau)^power)        tau from 0 at t_i to 1 at t_f, shares of the training steps

Ref: LBC, eq. 6; Zhu & Gupta, arXiv 1710.01878, eq. 1; the power is 3 in both.
"""

from __future__ import annotations

from nm_compiler.errors import NMError


def check_decline(name: str, t_i: float, t_f: float, power: int) -> None:
    """Raise NMError that names the method unless ``0 <= t_i < t_f <= 1`` and power is a whole number from 1 to 8."""
    if not all(isinstance(t, (int, float)) for t in (t_i, t_f)) or not 0 <= t_i < t_f <= 1:
        raise NMError(f"{name}(t_i={t_i!r}, t_f={t_f!r}): shares of training, 0 <= t_i < t_f <= 1")
    if isinstance(power, bool) or not isinstance(power, int) or not 1 <= power <= 8:
        raise NMError(f"{name}(power={power!r}): of the schedule, a whole number from 1 to 8 (3 in the paper)")


def window(t_i: float, t_f: float, total: int) -> tuple[int, int]:
    """The steps of ``total`` at which it begins and ends; at least one lies between."""
    begin = min(int(t_i * total + 0.5), total - 1)
    return begin, max(int(t_f * total + 0.5), begin + 1)


def left(step: int, between: tuple[int, int], power: int, *, entries: int, last: int) -> int:
    """How many of ``entries`` are there after ``step`` steps; ``last`` at the end. between: from `window`."""
    begin, end = between
    remaining = end - min(max(step, begin), end)
    return last - (-(entries - last) * int(remaining**power) // int((end - begin) ** power))
