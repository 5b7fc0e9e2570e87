"""Methods of the model that a captured one does not have, and what to do in their place.

They would multiply dense weights, write dense files, or change layers that the captured graph does not call.
"""

from __future__ import annotations

from collections.abc import Mapping

from nm_compiler.errors import NMError

_LIVE = "compile it without example inputs: nm.compile(model) keeps all of them"
_CHECKPOINTS = (
    "a captured graph recomputes nothing: leave gradient_checkpointing out, or, where memory matters, call it on the model "
    f"and {_LIVE.replace('all of them', 'checkpoints')}"
)
_EMBEDDING = (
    "a captured graph calls no layer, so a hook on the embedding, as NEFTune's, or another embedding would do nothing: "
    f"{_LIVE.replace('all of them', 'hooks')}; to look at it: .origin"
)
_SAVING = (
    "its weights are dense while it trains: nm.freeze(model) returns the model to save; to go on from there, use "
    "nm.save_checkpoint or state_dict()"
)
_INSTEAD: Mapping[str, str] = {
    "gradient_checkpointing_enable": _CHECKPOINTS,
    "gradient_checkpointing_disable": _CHECKPOINTS,
    "set_grad_checkpointing": _CHECKPOINTS,
    "get_input_embeddings": _EMBEDDING,
    "set_input_embeddings": _EMBEDDING,
    "enable_input_require_grads": _EMBEDDING,
    "resize_token_embeddings": "the captured graph has the sizes of before: call it before nm.compile, or after nm.freeze",
    "save_pretrained": _SAVING,
    "push_to_hub": _SAVING,
}
_ELSE = (
    "only forward() was captured, and a method would run the dense weights. Freeze first, then call it on the frozen model, "
    f"or, to train a model whose methods are called, {_LIVE} (.origin has them too, dense)"
)


TELLING = ("no_weight_decay", "no_weight_decay_keywords", "group_matcher")
"""Methods that run no weight, but name parameters: timm's optimizers ask `hasattr`, and decay others where there are none."""


class Absent(NMError, AttributeError):
    """A captured model has no such method; for ``hasattr`` too, by which libraries ask."""


def absent(model: object, name: str) -> Absent:
    """What to say of the method ``name`` of ``model``."""
    return Absent(f"{type(model).__name__}.{name} is not there once captured: {_INSTEAD.get(name, _ELSE)}")
