"""What ``forward`` keeps from call to call in plain attributes: an exported graph holds what they were for good.

    self.step += 1
    if self.step > self.warmup: ...        never taken, or always
    if not self.ready: self.start(x)       in every call
    self.ready = True
    self.memory = h.detach()               the memory of the capture, or none, in every call

Export runs these lines once. So the capture of a model that is to train fails where a number of a layer is another afterwards
and more is done with it than to count it up, or a tensor is, and that mode runs in TorchDynamo's fragments, which keep both.
What is set anew before it is read, as the size of an image, is nothing kept, nor is a tensor that a second call leaves, as a
mask that is made once. Of what lies in lists and dicts this is not asked: one that grows is compiled again at each length.
"""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType

from torch import Tensor, nn

from nm_compiler.capture.held import codes_of
from nm_compiler.errors import NMError

_Place = tuple[str, str]  # the path of a layer, and the name of an attribute
_NUMBERS = (bool, int, float)
_ELSEWHERE = ("COMPARE", "IS_OP", "CONTAINS", "TO_BOOL", "POP", "JUMP", "STORE", "RETURN", "YIELD")
"""Where a value goes that is read and not set anew, by how the names of the instructions begin."""


class Counted(RuntimeError):
    """An exported graph would hold this number for ever."""


@contextlib.contextmanager
def nothing_counted(
    model: nn.Module, again: Callable[[], object], *, numbers: bool = True, way_out: str = ""
) -> Iterator[None]:
    """Raises NMError afterwards if forward() has changed what it goes by in its next call; its cause is `Counted`.

    again: calls the model with real values, for tensors that have changed; numbers: whether these are asked; way_out: one
    more for the message.
    """
    before, changed = dict[_Place, object](), dict[_Place, object]()

    def begin(*_: object) -> None:  # here, since train() and eval() may set some
        before.update(_plain(model))

    def end(*_: object) -> None:  # here, since torch.export puts attributes back
        changed.update(_others(before, _plain(model)))

    handles = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if any(not isinstance(value, _NUMBERS) for value in changed.values()):
        moving = _moving(model, again)
        changed = {key: value for key, value in changed.items() if isinstance(value, _NUMBERS) or key in moving}
    if not numbers:
        changed = {key: value for key, value in changed.items() if not isinstance(value, _NUMBERS)}
    if not changed:
        return
    codes = [code for kind in {type(module) for module in model.modules()} for code in codes_of(kind, "forward")]
    for (path, name), value in changed.items():
        if keeps(codes, name, elsewhere=isinstance(value, _NUMBERS)):
            text = (
                f"forward() of this {type(model).__name__} sets {f'{path}.{name}'.lstrip('.')} and reads it in its next call"
            )
            told = f"{text}: one graph would hold what it was at capture for good. Keep it in a buffer{way_out}"
            if isinstance(value, float):  # TorchDynamo loses one that it takes for an input, while it is watched
                raise NMError(f"{told}, or say nm.compile(model), without inputs")
            raise NMError(told) from Counted(text)


def counts(model: nn.Module) -> bool:
    """Whether forward() of the model or of a layer sets a whole number of its own."""
    kinds: dict[type, set[str]] = {}
    for module in model.modules():
        if type(module) not in kinds:
            steps = (step for code in codes_of(type(module), "forward") for step in dis.get_instructions(code))
            kinds[type(module)] = {step.argval for step in steps if step.opname == "STORE_ATTR"}
        if any(type(module.__dict__.get(name)) is int for name in kinds[type(module)]):
            return True
    return False


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


def _moving(model: nn.Module, again: Callable[[], object]) -> Mapping[_Place, object]:
    """What is another after a second call as well. Nothing where the model does not run, of which capture has said why."""
    try:
        again()
        before = _plain(model)
        again()
    except Exception:
        return {}
    return _others(before, _plain(model))


def _others(before: Mapping[_Place, object], after: Mapping[_Place, object]) -> dict[_Place, object]:
    """The values of ``after`` that are others than before: numbers by value, tensors by identity."""
    found = dict[_Place, object]()
    for key, value in before.items():
        now = after.get(key)
        if isinstance(value, _NUMBERS) and isinstance(now, _NUMBERS):
            if now != value:
                found[key] = now
        elif now is not value:
            found[key] = now
    return found


def _plain(model: nn.Module) -> dict[_Place, object]:
    """The numbers, the tensors, tuples of these and None in the attributes of all layers."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name not in ("training", "_compiled_call_impl") and isinstance(value, (*_NUMBERS, Tensor, tuple, type(None)))
    }
