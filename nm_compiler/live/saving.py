"""A live Hugging Face model that is saved while it trains says so: what is written are dense weights and a method's state.

model.save_pretrained(folder)             weights as they train, scores and live sets beside them, to go on from
from_pretrained(folder)                   drops the state: dense
nm.freeze(model).save_pretrained(folder)  zeros in the weights
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from nm_compiler.live.prepared import Prepared

_log = logging.getLogger(__name__)
_NAME = "save_pretrained"


class Saving:
    """The model's own ``save_pretrained``, which says once what it writes."""

    def __init__(self, model: nn.Module, carrier: Prepared) -> None:
        self.model, self.carrier, self.told = model, carrier, False
        model.__dict__[_NAME] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model's class."""
        if not self.told:
            _log.warning(
                "%s writes this %s as it trains: dense weights and the state of %s, to go on from. from_pretrained drops the "
                "state; to deploy zeros, nm.freeze(model).%s(...)",
                _NAME, type(self.model).__name__, self.carrier.method.name, _NAME,
            )  # fmt: skip
        self.told = True
        return getattr(type(self.model), _NAME)(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Saving:
        return Saving(copy.deepcopy(self.model, memo), copy.deepcopy(self.carrier, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Saving, (self.model, self.carrier)


def watch_saving(model: nn.Module, carrier: Prepared) -> None:
    """Have a model that can be saved so say what it writes."""
    if hasattr(type(model), _NAME):
        Saving(model, carrier)


def unwatch_saving(model: nn.Module) -> None:
    """Give the model its own method back."""
    if isinstance(model.__dict__.get(_NAME), Saving):
        del model.__dict__[_NAME]
