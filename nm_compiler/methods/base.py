"""What a method is. A new one is one file: a frozen dataclass with these few functions. See docs/new-method.md."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.graph import Pass
from nm_compiler.sites.plan import Site
from nm_compiler.state.beside import Weight
from nm_compiler.untouched import untouched


@dataclass(frozen=True, slots=True)
class Clock:
    """Where training stands: ``step`` of ``total`` optimizer steps are done; ``seed`` of the compile call.

    rate: the learning rate of a parameter in the optimizer that the scheduler was given; None if it was given none.
    memory: what that optimizer remembers of a parameter, such as Adam's ``exp_avg_sq``; empty before its first step.
    """

    step: int
    total: int
    seed: int
    rate: Callable[[Tensor], float] | None = None
    memory: Callable[[Tensor], Mapping[str, Any]] | None = None


class Method(ABC):
    """A way to train N:M weights. Subclasses are frozen dataclasses: their fields are the user's options."""

    @property
    def name(self) -> str:
        """As the user writes it: ``LBC``, ``BiMask``."""
        return type(self).__name__

    def __str__(self) -> str:
        """The method with its options, the same in every process: functions by name."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        shown = (f"{key}={v if isinstance(v, Method) else _named(v)}" for key, v in options.items())
        return f"{self.name}({', '.join(shown)})"

    def brief(self) -> str:
        """As `__str__`, without the options that are as they are by default."""
        changed = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            plain = field.default if field.default_factory is MISSING else field.default_factory()
            if value is plain or (isinstance(value, (int, float, str, Method)) and value == plain):
                continue
            given = "given" if isinstance(value, Mapping) else _named(value)
            changed.append(f"{field.name}={value.brief() if isinstance(value, Method) else given}")
        return f"{self.name}({', '.join(changed)})"

    def layout(self) -> Mapping[str, Any]:
        """What decides the form of the state; a checkpoint of another layout is refused."""
        return {"method": self.name}

    def check(self, site: Site) -> None:  # noqa: B027  optional
        """Raise NMError where the method cannot do this site's pattern."""

    @abstractmethod
    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        """The graph rewrites, in order, that put this method behind the weights of ``sites``."""

    @property
    def backward_share(self) -> float:
        """How much the search of ``compile(permute=)`` counts what a backward mask keeps beside the forward mask.

        0 where the method has no backward mask, or finds an order for it by itself.
        """
        return 0.0

    @property
    def folds(self) -> bool:
        """Whether the method needs the channels in a searched order: `compile` then permutes without being asked."""
        return False

    def constants(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """The tables that `passes` put into graphs, by name: they are not saved, but made afresh."""
        return {}

    @abstractmethod
    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        """The fresh state of a weight by suffix; a Parameter learns, a tensor is a buffer. Must not change ``weight``."""

    def suffixes(self, site: Site) -> tuple[str, ...]:
        """The names `state` gives, without computing it."""
        return ()

    def remark(self, weight: Weight) -> str | None:
        """What the report should say of a weight that this method treats in a special way, or None."""
        return None

    def live(self, weight: Weight) -> float | None:
        """Mean number of live combinations a group, where the method has such a thing."""
        return None

    def numbers(self, weight: Weight) -> Mapping[str, float]:
        """What a row of `nm_compiler.Telemetry` says of a weight besides, by names of the method's own."""
        return {}

    def problem(self, site: Site, state: Mapping[str, Tensor]) -> str | None:
        """Why loaded values of the right shapes cannot be this method's state, or None."""
        return None

    def begin(self, weights: Sequence[Weight], clock: Clock) -> None:  # noqa: B027  optional
        """Called when a scheduler is made or loaded: settle what depends on the step alone, e.g. who gets gradients."""

    def advance(self, weights: Sequence[Weight], clock: Clock) -> None:  # noqa: B027  optional
        """Called after every optimizer step, with ``clock.step`` counted; as `begin` and `settle` without gradients."""

    def catch_up(self, weights: Sequence[Weight], clock: Clock) -> None:  # noqa: B027  optional
        """Called after the first `advance` of a scheduler and that after a state_dict was loaded: state may be behind."""

    def is_settled(self, weight: Weight) -> bool:
        """Whether the forward mask of this weight is exactly N:M now, so that it can be frozen."""
        return True

    def settle(self, weight: Weight) -> None:  # noqa: B027  optional
        """Make it so at once (``freeze(finish=True)``)."""


def spelled(kind: type[Method]) -> str:
    """A method's class as the user writes it: ``nm.LBC``, and ``Mine`` where it is one of their own."""
    return f"nm.{kind.__name__}" if kind.__module__.startswith("nm_compiler.") else kind.__name__


def state_of(method: Method, site: Site, weight: Tensor) -> dict[str, Tensor]:
    """`Method.state` with memory of its own. Raises NMError if it writes to the weight, or gives what `suffixes` does not."""
    with untouched(weight, site.name, f"{method.name}.state()", "work on weight.clone()"):
        state = method.state(site, weight)
    named = method.suffixes(site)
    if set(state) != set(named):
        raise NMError(
            f"{site.name} of shape {list(site.shape)}: {method.name}.state() gives {_listed(state)}, but suffixes() names "
            f"{_listed(named)}, and goes by that in checkpoints and at nm.freeze: name the same in both"
        )
    held = {weight.untyped_storage()._cdata}
    for suffix, value in state.items():
        if value.untyped_storage()._cdata in held:
            raise NMError(
                f"{site.name} of shape {list(site.shape)}: the {suffix!r} of {method.name}.state() shares memory with the "
                "weight or with other state of it, so that a change of one would change both: return value.clone()"
            )
        held.add(value.untyped_storage()._cdata)
    return state


def _named(value: Any) -> str:
    """As an option is shown: functions by name, and nothing by where it lies in memory, which the next process is not told."""
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
