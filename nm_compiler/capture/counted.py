"""Numbers that ``forward`` keeps from call to call: an exported graph holds those of its capture for good.

    self.step += 1
    if self.step > self.warmup: ...        never taken, or always
    if not self.ready: self.start(x)       in every call
    self.ready = True

Export runs these lines once. So the capture of a model that is to train fails where a number of a layer is another afterwards
and more is done with it than to count it up, and that mode runs in TorchDynamo's fragments, which keep it. What is set anew
before it is read, as the size of an image, is no such number.
"""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator, Sequence
from types import CodeType

from torch import nn

from nm_compiler.capture.held import codes_of
from nm_compiler.errors import NMError

_PLAIN = (bool, int, float)
_ELSEWHERE = ("COMPARE", "IS_OP", "CONTAINS", "TO_BOOL", "POP", "JUMP", "STORE", "RETURN", "YIELD")
"""Where a value goes that is read and not set anew, by how the names of the instructions begin."""


class Counted(RuntimeError):
    """An exported graph would hold this number for ever."""


@contextlib.contextmanager
def nothing_counted(model: nn.Module) -> Iterator[None]:
    """Raises NMError afterwards if a number has changed that forward() goes by in its next call; its cause is `Counted`."""
    before, changed = dict[tuple[str, str], object](), dict[tuple[str, str], object]()

    def begin(*_: object) -> None:  # here, since train() and eval() may set some
        before.update(_numbers(model))

    def end(*_: object) -> None:  # here, since torch.export puts attributes back
        after = _numbers(model)
        changed.update({key: after.get(key) for key, value in before.items() if after.get(key) != value})

    handles = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not changed:
        return
    codes = [code for kind in {type(module) for module in model.modules()} for code in codes_of(kind, "forward")]
    for (path, name), value in changed.items():
        if keeps(codes, name):
            text = (
                f"forward() of this {type(model).__name__} sets {f'{path}.{name}'.lstrip('.')} and reads it in its next call"
            )
            told = f"{text}: one graph would hold what it was at capture for good. Keep it in a buffer"
            if isinstance(value, float):  # TorchDynamo loses one that it takes for an input, while it is watched
                raise NMError(f"{told}, or say nm.compile(model), without inputs")
            raise NMError(told) from Counted(text)


def keeps(codes: Sequence[CodeType], name: str) -> bool:
    """Whether the attribute ``name`` is read before it is set, and for more than to count it up; or set somewhere else."""
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
    return not known or (first and others > 0)


def _numbers(model: nn.Module) -> dict[tuple[str, str], object]:
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if isinstance(value, _PLAIN) and name != "training"
    }
