"""What to run: the data, the model, the contestants and their common budget. A wrong setting cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nm_compiler.demo.models import MODELS
from nm_compiler.errors import NMError
from nm_compiler.methods.base import Method
from nm_compiler.methods.bimask import BiMask
from nm_compiler.methods.lbc import LBC
from nm_compiler.methods.magnitude import Magnitude
from nm_compiler.methods.srste import SRSTE
from nm_compiler.pattern import Pattern
from nm_compiler.wording import first_line

METHODS: dict[str, Callable[[], Method]] = {"magnitude": Magnitude, "srste": SRSTE, "lbc": LBC, "bimask": BiMask}
TITLES = {"dense": "dense", "magnitude": "one-shot magnitude", "srste": "SR-STE", "lbc": "LBC", "bimask": "Bi-Mask"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One contestant: a key of `TITLES` and its pattern, which dense training has none of."""

    method: str
    pattern: Pattern | None = None

    def __str__(self) -> str:
        return TITLES[self.method] + (f" {self.pattern}" if self.pattern else "")


DENSE = Entry("dense")


@dataclass(frozen=True, slots=True)
class Settings:
    """A run of the demo. ``data`` None means the packaged digits; otherwise CIFAR-10 at that path.

    seeds: number of repetitions; limit: so many training images and at most so many test images, None for all;
    device: as torch names it. Every contestant gets SGD with momentum, the same weight decay, and one cosine over all steps.
    Raises NMError for values that cannot be run.
    """

    data: str | None = None
    model: str = "digits"
    methods: tuple[str, ...] = tuple(METHODS)
    patterns: tuple[Pattern, ...] = (Pattern(2, 4), Pattern(1, 4))
    seeds: int = 3
    epochs: int = 25
    batch_size: int = 64
    limit: int | None = None
    device: str = "cpu"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise NMError(f"no model called {self.model!r}: choose one of {', '.join(MODELS)}")
        if (self.data is None) != (self.model == "digits"):
            way = "give --data PATH, or leave --model out" if self.data is None else "choose --model resnet20 or resnet32"
            raise NMError(f"--model {self.model} with {'the digits' if self.data is None else 'CIFAR-10'}: {way}")
        if not self.methods or not self.patterns:
            raise NMError("nothing to compare: name at least one method and one pattern")
        for method in self.methods:
            if method not in METHODS:
                raise NMError(f"no method called {method!r}: choose from {', '.join(METHODS)}")
        for name in ("seeds", "epochs", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise NMError(f"--{name.replace('_', '-')} {value}: needs a whole number of at least 1")
        _check_device(self.device)

    @property
    def entries(self) -> list[Entry]:
        """The contestants: dense first, then method by method under each pattern."""
        return [DENSE, *(Entry(method, pattern) for pattern in self.patterns for method in self.methods)]


def choose(*, data: str | None = None, model: str | None = None, quick: bool = False, **given: Any) -> Settings:
    """Settings with the defaults that fit the data; options given as None count as not given. Raises NMError."""
    if data is None:
        base = Settings(model=model or "digits")
        base = replace(base, seeds=1, epochs=6) if quick else base
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base = Settings(data, model or "resnet20", epochs=100, batch_size=128, device=given.get("device") or device)
        base = replace(base, seeds=1, epochs=2, limit=512) if quick else base
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise NMError(f"--device {name} cannot be used here ({first_line(error)}): try --device cpu") from error
