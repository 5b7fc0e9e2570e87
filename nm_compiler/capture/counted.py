"""What ``forward`` keeps from call to call in plain attributes: an exported graph holds what they were for good.

    self.step += 1
    if self.step > self.warmup: ...        never taken, or always
    if not self.ready: self.start(x)       in every call
    self.ready = True
    self.memory = h.detach()               the memory of the capture, or none, in every call

Export runs these lines once. So the capture of a model that is to train fails where a number of a layer is another afterwards
and more is done with it than to count it up, or a tensor is, and that mode runs in TorchDynamo's fragments, which keep both.
What is set anew before it is read, as the size of an image, is nothing kept, nor is what a second call leaves, as a mask that
is made once or a window that is made to fit; but a switch is. So it is with what lies in lists and dicts, unless things are
only put into them, as into a record of losses: fragments would be compiled again at each length.
"""

from __future__ import annotations

import contextlib
import dis
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType

import torch
from torch import Tensor, nn

from nm_compiler.capture.export import in_mode
from nm_compiler.capture.held import codes_of
from nm_compiler.errors import NMError

_Place = tuple[str, str]  # the path of a layer, and the name of an attribute
_NUMBERS = (bool, int, float)
CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict)
_OF_MODULES = frozenset(nn.Module().__dict__)
_PUTTING = ("append", "appendleft", "extend", "add", "update", "clear")
_ELSEWHERE = ("COMPARE", "IS_OP", "CONTAINS", "TO_BOOL", "POP", "JUMP", "STORE", "RETURN", "YIELD")
"""Where a value goes that is read and not set anew, by how the names of the instructions begin."""


class Counted(RuntimeError):
    """An exported graph would hold this number for ever."""


@contextlib.contextmanager
def nothing_counted(
    model: nn.Module, again: Callable[[], object], training: bool, *, numbers: bool = True, way_out: str = ""
) -> Iterator[None]:
    """Raises NMError afterwards if forward() has changed what it goes by in its next call; its cause is `Counted`.

    again: calls the model with real values, in the mode ``training``, for tensors that have changed; numbers: whether these
    are asked; way_out: one more for the message.
    """
    before, changed = dict[_Place, object](), dict[_Place, object]()

    def begin(*_: object) -> None:  # here, since train() and eval() may set some
        before.update(_plain(model))

    def end(*_: object) -> None:  # here, since torch.export puts attributes back
        changed.update(_others(before, _plain(model)))

    handles = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute")  # was assigned, says torch.export: so is it said here
            yield
    finally:
        for handle in handles:
            handle.remove()
    if not numbers:
        changed = {key: value for key, value in changed.items() if not isinstance(value, _NUMBERS)}
    if not changed:
        return
    codes = [code for kind in {type(module) for module in model.modules()} for code in codes_of(kind, "forward")]
    read = {key: value for key, value in changed.items() if _is_read(codes, key[1], before[key], value)}
    moving = {} if all(_is_switch(before[key], value) for key, value in read.items()) else _moving(model, again, training)
    for (path, name), value in read.items():
        if (path, name) in moving or _is_switch(before[path, name], value):
            raise _kept(type(model).__name__, f"{path}.{name}".lstrip("."), before[path, name], value, way_out)


def _is_read(codes: Sequence[CodeType], name: str, before: object, now: object) -> bool:
    """Whether forward() goes by the attribute ``name`` in its next call, told from its code."""
    if isinstance(before, Content) and isinstance(now, Content) and before.of is now.of:
        return reads(codes, name)
    return keeps(codes, name, elsewhere=isinstance(now, _NUMBERS))


def _kept(model: str, where: str, before: object, value: object, way_out: str) -> NMError:
    text = f"forward() of this {model} sets {where} and reads it in its next call"
    told = f"{text}: one graph would hold what it was at capture for good. Keep it in a buffer{way_out}"
    if any(isinstance(each, float) for each in _moved(before, value)):  # TorchDynamo loses one that is an input, while watched
        return NMError(f"{told}, or say nm.compile(model), without inputs")
    if isinstance(value, Content) and isinstance(value.of, deque):  # nor does it let go of what a full one does
        name = where.rpartition(".")[2]
        return NMError(f"{told}, or in a list (self.{name} = self.{name}[-3:])")
    error = NMError(told)
    error.__cause__ = Counted(text)
    return error


def _moved(before: object, now: object) -> list[object]:
    """The value, or those of its list or dict that are others than they were."""
    if not isinstance(now, Content):
        return [now]
    old = before.items if isinstance(before, Content) else ()
    return [new for at, new in enumerate(now.items) if at >= len(old) or not _same(old[at], new)]


def counts(model: nn.Module) -> bool:
    """Whether forward() of the model or of a layer sets a whole number of its own, or one in a list or dict of its own."""
    kinds: dict[type, tuple[set[str], set[str]]] = {}
    for module in model.modules():
        if type(module) not in kinds:
            steps = [step for code in codes_of(type(module), "forward") for step in dis.get_instructions(code)]
            putting = any(step.opname == "STORE_SUBSCR" for step in steps)
            read = {step.argval for step in steps if step.opname == "LOAD_ATTR" and putting}
            kinds[type(module)] = {step.argval for step in steps if step.opname == "STORE_ATTR"}, read
        stored, read = kinds[type(module)]
        if any(type(module.__dict__.get(name)) is int for name in stored):
            return True
        if any(type(each) is int for name in read for each in _contents(module.__dict__.get(name))):
            return True
    return False


def _contents(value: object) -> tuple[object, ...]:
    """What lies in a list or a dict; nothing in all else."""
    return tuple(value.values()) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else ()


def keeps(codes: Sequence[CodeType], name: str, *, elsewhere: bool = True) -> bool:
    """Whether the attribute ``name`` is read before it is set, and for more than to count it up.

    elsewhere: what to say of one that is set in other code.
    """
    first, others, known = False, 0, False
    for code in codes:
        counting = read = stored = False  # counting: what was read last may be on its way to be set
        for step in dis.get_instructions(code):
            if step.argval == name and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                others, counting, read = others + counting, True, True
            elif step.argval == name and step.opname == "STORE_ATTR":
                first, counting, stored = first or (read and not stored), False, True
            elif counting and step.opname.startswith(_ELSEWHERE):
                others, counting = others + 1, False
        known |= stored
        others += counting
    return first and others > 0 if known else elsewhere


def reads(codes: Sequence[CodeType], name: str) -> bool:
    """Whether more is done with the list or dict ``name`` than to put things into it."""
    for code in codes:
        steps = list(dis.get_instructions(code))
        for step, following in pairwise(steps):
            own = step.argval == name and step.opname in ("LOAD_ATTR", "LOAD_METHOD")
            if own and following.argval not in _PUTTING:
                return True
    return False


@dataclass(frozen=True)
class Content:
    """What lies in a list, dict or set, ``of`` which it was."""

    of: object
    items: tuple[object, ...]


def _is_switch(before: object, now: object) -> bool:
    """Whether a number says whether something was done: it moves once, and so does a size that is made to fit the input."""
    return isinstance(before, _NUMBERS) and isinstance(now, _NUMBERS) and {before, now} <= {0, 1}


def _moving(model: nn.Module, again: Callable[[], object], training: bool) -> Mapping[_Place, object]:
    """What is another after a second call as well. Nothing where the model does not run, of which capture has said why."""
    with contextlib.suppress(Exception), in_mode(model, training), torch.no_grad():
        again()
        before = _plain(model)
        again()
        return _others(before, _plain(model))
    return {}


def _others(before: Mapping[_Place, object], after: Mapping[_Place, object]) -> dict[_Place, object]:
    """The values of ``after`` that are others than before."""
    return {key: after.get(key) for key, value in before.items() if not _same(value, after.get(key))}


def _same(one: object, other: object) -> bool:
    """Numbers by value, what holds several things by those, tensors and all else by identity: a size may be a symbol."""
    if isinstance(one, _NUMBERS) and isinstance(other, _NUMBERS):
        return one == other
    if isinstance(one, Content) and isinstance(other, Content):
        return one.of is other.of and _same(one.items, other.items)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other


def _plain(model: nn.Module) -> dict[_Place, object]:
    """The numbers, tensors, tuples and None in the attributes of all layers, and what is in their lists, dicts and sets."""
    found = dict[_Place, object]()
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if type(value) in CONTAINERS and name not in _OF_MODULES:
                items = (*value.keys(), *value.values()) if isinstance(value, dict) else tuple(value)
                found[path, name] = Content(value, items)
            elif isinstance(value, (*_NUMBERS, Tensor, tuple, type(None))) and name not in _OF_MODULES:
                found[path, name] = value
    return found
