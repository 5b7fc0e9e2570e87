"""Optimizers beside a sparse model: which parameters get what, whether scores are among them, and what frozen ones leave."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nm_compiler.carrier import Carrier
from nm_compiler.errors import NMError
from nm_compiler.state.beside import learns
from nm_compiler.state.sharding import is_sharded
from nm_compiler.unwrapping import unwrap

_log = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    score_lr: float | None = None,
    score_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: ``torch.optim.SGD(nm.parameter_groups(sparse, weight_decay=5e-4), lr=0.1)``.

    Up to three groups, each with a ``"name"``: ``weights``, of two or more axes, decay; ``others`` (biases, norms) do not;
    ``scores`` (LBC's) have ``score_lr`` and ``score_weight_decay``, those of the weights if left out, as in the paper.
    Parameters that do not require gradients are left out, but for scores, which a loaded checkpoint may let learn again.

    model: what `compile` returned, also inside DDP or ``torch.compile``. Raises NMError for other models or negative numbers.
    """
    for name, value in (("weight_decay", weight_decay), ("score_lr", score_lr), ("score_weight_decay", score_weight_decay)):
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
            raise NMError(f"parameter_groups({name}={value!r}): needs a finite number >= 0")
    module = unwrap(model)
    scores = learned_state(module)
    ids = {id(parameter) for parameter in scores.values()}
    own = [parameter for parameter in module.origin.parameters() if id(parameter) not in ids and parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": [p for p in own if p.ndim > 1], "weight_decay": weight_decay},
        {"name": "others", "params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
        {
            "name": "scores",
            "params": list(scores.values()),
            "weight_decay": weight_decay if score_weight_decay is None else score_weight_decay,
            **({} if score_lr is None else {"lr": score_lr}),
        },
    ]
    return [group for group in groups if group["params"]]


def learned_state(module: Carrier) -> dict[str, nn.Parameter]:
    """The state that learns, by name: LBC's scores."""
    found = {}
    for weight in module.weights:
        for suffix in module.method.suffixes(weight.site):
            value = weight[suffix]
            if learns(value):
                found[f"{weight.site.name}_{suffix}"] = value
    return found


def owners_of(module: Carrier) -> dict[str, nn.Parameter]:
    """The weights by the names of the state beside them."""
    return {f"{w.site.name}_{s}": w.param for w in module.weights for s in module.method.suffixes(w.site)}


def check_holds(optimizer: torch.optim.Optimizer, module: Carrier) -> None:
    """Raise NMError unless the optimizer holds all of the learned state; of that of frozen weights the log says so.

    Also for one that takes a score for an entry of a matrix.
    """
    state, owners = learned_state(module), owners_of(module)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, value in state.items() if id(value) not in held and owners[name].requires_grad]
    if missing:
        raise NMError(f"{type(optimizer).__name__} does not hold {_named(missing, state)}. {_WAY_OUT}")
    idle = [name for name, value in state.items() if id(value) not in held and value.requires_grad]
    if idle:
        _log.warning("%s does not hold %s, whose weight is frozen. %s", type(optimizer).__name__, _named(idle, state), _IDLE)
    problem = _turned(optimizer, state)
    if problem is not None:
        raise NMError(f"{problem}, as SparsityScheduler(optimizer=) too, or to a group of it that it does not orthogonalise")


def _turned(optimizer: Any, state: Mapping[str, Tensor]) -> str | None:
    """What is wrong where an optimizer takes scores for matrices."""
    turned = _orthogonalised(optimizer)
    matrices = [name for name, value in state.items() if id(value) in turned]
    if not matrices:
        return None
    return (
        f"{type(optimizer).__name__} holds {_named(matrices, state)}, and orthogonalises matrices, which scores are none: "
        "give it the group 'weights' of nm.parameter_groups(sparse), and the others to AdamW or SGD"
    )


def _orthogonalised(optimizer: Any) -> set[int]:
    """The ids of what a Muon or a SCION, of torch or of others, takes for matrices: all but groups marked for another rule."""
    kind = type(optimizer).__name__.lower()
    if "muon" in kind:
        groups = [
            each for each in optimizer.param_groups if each.get("use_muon") is not False and not each.get("use_fallback")
        ]
    elif "scion" in kind:
        groups = [each for each in optimizer.param_groups if _is_spectral(each.get("norm_type", each.get("norm", "auto")))]
    else:
        return set()
    return {id(parameter) for group in groups for parameter in group["params"]}


def _is_spectral(norm: Any) -> bool:
    """Whether a SCION takes parameters of a norm for matrices: by the norm's name, or its number in pytorch_optimizer."""
    return norm in (1, 2, 3) if isinstance(norm, int) else str(norm).lower().startswith(("auto", "spectral"))


def _turned_unseen(state: Mapping[str, Tensor]) -> str | None:
    """`_turned` of an optimizer of this process that has stepped the scores and that nobody told of."""
    for each in gc.get_objects() if state else ():
        if issubclass(type(each), torch.optim.Optimizer) and (problem := _turned(each, state)) is not None:
            held = (each.state.get(value) for value in state.values() if value in each.state)
            if any(held):
                return problem
    return None


def drop_frozen(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Forget momentum and the like of learned state that has stopped learning.

    Not where the optimizer has an ``eval()``, as SPlus: that may ask what it remembers of every parameter.
    """
    for value in state.values() if not hasattr(optimizer, "eval") else ():
        if not value.requires_grad:
            optimizer.state.pop(value, None)


def rate_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """The learning rate of a parameter as it stands; 0 for one that the optimizer does not hold."""
    groups = (group for group in optimizer.param_groups if any(held is parameter for held in group["params"]))
    return next((float(group["lr"]) for group in groups), 0.0)


def state_in(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """What an optimizer remembers of a parameter, such as Adam's ``exp_avg_sq``; empty before its first step."""
    found: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return found


def hooked_step(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose ``step`` calls hooks, inside wrappers such as accelerate's. Raises NMError if there is none.

    Of one that loops step in two parts, ``first_step()`` and ``second_step()`` as SAM's, it is the ``base_optimizer``, which
    steps once in the second.
    """
    inner = optimizer
    while not _calls_hooks(inner) or hasattr(inner, "second_step"):
        inner = _wrapped(inner)
        if inner is None:
            raise NMError(
                f"{type(optimizer).__name__} calls no hooks after its step(): call scheduler.step() there in place of follow()"
            )
    found: torch.optim.Optimizer = inner
    return found


def _calls_hooks(optimizer: Any) -> bool:
    """Whether ``step`` calls hooks: timm's Lookahead, which leaves torch's ``__init__`` out, calls none before `zero_grad`."""
    return hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(type(optimizer).step, "hooked", False)


def _wrapped(optimizer: Any) -> Any:
    """The optimizer that a wrapper of one calls, whatever the wrapper calls it; None if it holds none."""
    held = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    named = getattr(optimizer, "base_optimizer" if hasattr(optimizer, "second_step") else "optimizer", None)
    return named if named is not None else next(iter(held), None)


class FirstStep:
    """Finds out, without being told the optimizer, whether it moves the learned state as it moves the weights.

    A tensor counts its changes in place; so an optimizer that was built before `compile`, or from some parameters only, shows
    in the first step that moves a weight and not its scores. What is written through ``.data``, as ZeroRedundancyOptimizer
    does with parameters of other ranks, is not counted: some of the values tell then.
    """

    def __init__(self, module: Carrier) -> None:
        self._module = module
        self._before = self._now()

    def _now(self) -> dict[str, tuple[Tensor, int, Tensor, int, Tensor]]:
        state, owners = learned_state(self._module), owners_of(self._module)
        return {
            name: (owners[name], owners[name]._version, score, score._version, _some(score)) for name, score in state.items()
        }

    def check(self) -> bool:
        """Whether a weight has moved, so that there is nothing to look for any more. Raises NMError if its scores have not."""
        now, stuck, idle, moved = self._now(), {}, {}, False
        for name, (weight, version, score, score_version, some) in now.items():
            old = self._before[name]
            if weight is not old[0] or score is not old[2]:  # replaced, by load_state_dict(assign=True): nothing to compare
                self._before[name] = now[name]
            elif version != old[1]:
                moved = True
                if score_version == old[3] and score.requires_grad and _same(some, old[4]):
                    stuck[name] = score
            elif score_version == old[3] and _is_left_out(weight, score) and _same(some, old[4]):
                idle[name] = score
        if stuck:
            raise NMError(
                f"optimizer.step() changed the weights, but not {_named(list(stuck), stuck)}: the optimizer does not hold "
                f"them, or did not step. {_WAY_OUT}; or give SparsityScheduler(optimizer=) the one that holds them"
            )
        problem = _turned_unseen({name: entry[2] for name, entry in now.items()}) if moved else None
        if problem is not None:
            raise NMError(f"{problem}. If a training of before had it, del it")
        if idle:
            _log.warning("optimizer.step() did not change %s, whose weight is frozen. %s", _named(list(idle), idle), _IDLE)
        return moved or bool(idle) or not now


def _is_left_out(weight: Tensor, score: Tensor) -> bool:
    """Whether a step would have moved the scores of a frozen weight: they have a gradient, and no scaler had to skip it."""
    if weight.requires_grad or not score.requires_grad or score.grad is None or score.is_meta:
        return False
    some = _some(score.grad)
    return bool(some.isfinite().all()) and bool(some.any())


def _some(values: Tensor) -> Tensor:
    """A copy of some numbers of a tensor, spread over all of it, or over this rank's shard."""
    own: Tensor = values.detach().to_local() if is_sharded(values) else values.detach()  # type: ignore[attr-defined]
    flat = own.flatten()
    return flat[:: max(1, flat.numel() // 1024)].clone()


def _same(values: Tensor, others: Tensor) -> bool:
    """Whether numbers are what they were; unknown ones are taken to be."""
    return values.is_meta or others.is_meta or torch.equal(values, others.to(values.device))


_IDLE = (
    "It has gradients, but never learns: if it should, build the optimizer from nm.parameter_groups(sparse), which has it; if "
    "not, requires_grad_(False) on it saves the gradient"
)
_WAY_OUT = "Build it after nm.compile, from sparse.parameters() or nm.parameter_groups(sparse)"


def _named(names: list[str], state: Mapping[str, Tensor]) -> str:
    shown = f"{names[0]} of shape {list(state[names[0]].shape)}"
    return shown if len(names) == 1 else f"{shown} and {len(names) - 1} more"
