"""Choose how each mode of a model is carried: by one exported graph where that works, by fragments where not."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.capture.counted import CONTAINERS, nothing_counted
from nm_compiler.capture.drawn import nothing_drawn
from nm_compiler.capture.explaining import explain
from nm_compiler.capture.export import capture_mode, in_mode, quiet, without_cache
from nm_compiler.capture.exported import Exported
from nm_compiler.capture.own_gradients import Lost, nothing_lost
from nm_compiler.errors import NMError
from nm_compiler.pattern import PatternMap, matches
from nm_compiler.state.beside import MARK

if TYPE_CHECKING:
    from nm_compiler.fragments.dynamo import Fragments

_log = logging.getLogger(__name__)
_NOT_OWN = {*nn.Module().__dict__, MARK}
_HOOKS = tuple(key for key, value in nn.Module().__dict__.items() if "hooks" in key and isinstance(value, dict))


def take(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None,
    modes: Sequence[bool] = (False, True), *, trains: bool = False, whole: bool = False,
) -> dict[bool, Exported | Fragments]:  # fmt: skip
    """A carrier for each of ``modes``, evaluation (False) and training (True), nothing rewritten yet.

    trains: gradients will be taken, in evaluation mode too, so those that the model makes by hand must not be lost.
    A mode that export refuses is run once on the example inputs, in fragments, or, if it has to be ``whole``, is an NMError
    that says why; the model is left as it was.
    Raises NMError that names the line of the user's code if neither works.
    """
    routes: dict[bool, Exported | Fragments] = {}
    for training in modes:
        refused: NMError | None = None
        try:
            lost = nothing_lost() if trains else contextlib.nullcontext()
            drawn = nothing_drawn(model) if trains and training else contextlib.nullcontext()
            again = partial(called, model, args, kwargs)
            counted = nothing_counted(model, again, training) if trains else contextlib.nullcontext()
            with (
                undone(model),
                in_mode(model, True),
                lost,
                drawn,
                counted,
            ):  # through train(): it forgets what eval() keeps
                routes[training] = Exported(*capture_mode(model, args, kwargs, dynamic_shapes, training=training))
        except NMError as error:
            if whole or error.__cause__ is None or (dynamic_shapes is not None and "dynamic_shapes" in str(error)):
                raise  # the mistake is in what the user said, not in the model
            mode = "training" if training else "evaluation"
            refused = error
            _log.info("%s in %s mode goes through TorchDynamo fragments: %s", type(model).__name__, mode, error)
        if refused is not None:
            with in_mode(model, training):
                routes[training] = _fragments(model, args, kwargs, training, refused)
    return routes


def called(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Call the model on copies of the inputs."""
    model(*copies_of(args), **{**without_cache(model, kwargs), **copies_of(dict(kwargs))})


def _fragments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, refused: NMError
) -> Fragments:
    from nm_compiler.fragments.dynamo import Fragments, OwnFault  # TorchDynamo is heavy, and most models do without

    carrier = Fragments(model, without_cache(model, kwargs))
    grad = training or isinstance(refused.__cause__, Lost)  # a tensor without gradients takes no hook
    try:
        with undone(model), torch.set_grad_enabled(grad), quiet():
            carrier.record(args, kwargs)
    except OwnFault as fault:
        if type(fault.__cause__) is not type(refused.__cause__):
            raise  # export had stopped at something else before it came there
        raise refused from refused.__cause__
    except NMError:
        raise
    except Exception as error:
        if type(error) is type(refused.__cause__):  # the model's own, in TorchDynamo's words, without its line
            raise refused from refused.__cause__
        raise NMError(explain(model, error, args, kwargs, training)) from error
    return carrier


def check_outside(
    model: nn.Module,
    routes: Mapping[bool, Exported | Fragments],
    patterns: PatternMap,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    captured: bool = True,
) -> None:
    """Raise NMError for a weight that Python multiplied outside fragments, where no mask could reach it.

    The first and the last weight of all stay dense anyway, unless ``include`` names them.
    captured: as for `nm_compiler.fragments.watching.outside_text`.
    """
    parameters = dict(model.named_parameters())
    for route in (each for each in routes.values() if not isinstance(each, Exported)):
        for name, line in route.outside.items():
            if name in route.edges and not matches(name, include):
                continue
            weight, pattern = parameters[name], patterns.of(name)
            could = weight.ndim >= 2 and weight.is_floating_point() and pattern is not None and not matches(name, exclude)
            if could and any(size % pattern.m == 0 for size in weight.shape):  # type: ignore[union-attr]
                from nm_compiler.fragments.watching import outside_text

                raise NMError(outside_text(name, line, captured=captured))


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Undo what calls within write to the model: buffers, plain attributes and random states are put back at the end."""
    back = way_back(model)
    try:
        yield
    finally:
        back()


def way_back(model: nn.Module) -> Callable[[], None]:
    """What puts buffers, plain attributes, what is in dicts and lists of them, and random states back to what they are."""
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    held = [(value, value.copy()) for _, before, _ in attributes for key, value in before.items() if _is_own(key, value)]
    hooks = [(before[key], set(before[key])) for _, before, _ in attributes for key in _HOOKS]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, numeric, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    there = [(index, torch.cuda.get_rng_state(index)) for index in devices]

    def back() -> None:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(own)
        for index, state in there:
            torch.cuda.set_rng_state(state, index)
        for module, before, buffers in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
            module._buffers.clear()
            module._buffers.update(buffers)
        for value, content in held:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(content)
        for known, those in hooks:  # Hugging Face's models hook themselves at the first call that gives hidden states
            for key in known.keys() - those:
                del known[key]
        with torch.no_grad():
            for buffer, value in values:
                if buffer.shape == value.shape and (buffer.is_meta or torch.equal(buffer, value)):
                    continue  # a backward pass that waits for it would refuse it if it were written to
                if buffer.shape != value.shape:  # observers of quantisation resize theirs
                    buffer.resize_(value.shape)
                buffer.copy_(value)

    return back


def _is_own(key: str, value: Any) -> bool:
    """Whether an attribute of a module is a dict, list or set of the model's own, such as a cache."""
    return type(value) in CONTAINERS and key not in _NOT_OWN


def copies_of(values: Any) -> Any:
    """Inputs for a run that must not be noticed: copies of tensors, and of other things where they can be copied."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, (int, float, complex, str, bytes, bool, type(None), nn.Module)):
            return value
        try:
            return copy.deepcopy(value)
        except Exception:
            return value

    return pytree.tree_map(one, values)
