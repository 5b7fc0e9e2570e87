# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Training's ops on a stand-in for CUDA: CPU tensors that the library takes for a GPU's, Triton kernels in the interpreter.

Every case runs an op twice, by its kernels and by torch operations alone, for tests/interpreted_triton.py to print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from nm_compiler.layout import as_rows
from nm_compiler.ops import two_masks as _two_masks  # noqa: F401 - registers it
from nm_compiler.ops import weights as _weights  # noqa: F401 - registers them
from nm_compiler.pattern import Pattern
from nm_compiler.solvers import masks, sweeps, two_masks
from nm_compiler.solvers.combinations import byte_table, pack
from nm_compiler.solvers.select import decayed

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("linear", "transposed", "conv", "channels_last", "conv1d", "experts", "experts_turned", "experts_inside")
LAUNCH = "a Triton kernel"
MOVES_NOTHING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::permute", "aten::view", "aten::detach",
                 "aten::as_strided", "aten::expand", "aten::ones_like", "aten::transpose", "aten::t", "aten::select", "aten::new_empty",
                 "aten::result_type", "detach"}  # fmt: skip
Case = tuple[str, bool]


@contextmanager
def on_gpu() -> Iterator[list[str]]:
    """Take CPU tensors for a GPU's; gives the names of the kernels that are launched."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[str] = []
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        with record_function(LAUNCH):
            return run(self, *args, **kwargs)

    with (
        mock.patch.object(InterpretedFunction, "run", counted),
        mock.patch.object(masks, "on_gpu", return_value=True),
        mock.patch.object(two_masks, "on_gpu", return_value=True),
        mock.patch.object(masks, "_has_kernel", return_value=False),
        mock.patch.object(masks, "_SMALL", 0),
    ):
        yield launched


@contextmanager
def by_torch() -> Iterator[None]:
    """No kernels: the weights here are too small for numba."""
    with mock.patch.object(sweeps, "kernels", return_value=None):
        yield


def weight(layout: str, m: int, dtype: torch.dtype, *, strange: bool) -> tuple[Tensor, tuple[int, ...]]:
    """With ties, zeros of both signs, and (strange) what is no number, infinite, or too large or small to multiply."""
    shape, rows = {
        "linear": ((3 * m, 7 * m), (0, 1)),
        "large": ((4 * m, 2048 // m // 4 * m + m), (0, 1)),
        "transposed": ((3 * m, 5 * m), (1, 0)),
        "conv": ((2 * m, 2 * m, 3, 2), (0, 2, 3, 1)),
        "channels_last": ((2 * m, 2 * m, 3, 2), (0, 2, 3, 1)),
        "conv1d": ((2 * m, m, 3), (0, 2, 1)),
        "experts": ((3, 2 * m, 2 * m), (0, 1, 2)),
        "experts_turned": ((3, 2 * m, m), (0, 2, 1)),
        "experts_inside": ((2 * m, 3, 2 * m), (1, 0, 2)),
        "gaps": ((2 * m, 2 * m), (0, 1)),
    }[layout]
    made = torch.randn(shape)
    few = torch.randint(-2, 3, shape) / 2
    made = torch.where(torch.rand(shape) < 0.3, torch.where(few == 0, -few, few), made)
    if strange:
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3e4, -3e38, 1e-7, 1e-41])
        made = torch.where(torch.rand(shape) < 0.2, odd[torch.randint(len(odd), shape)], made)
    made = made.to(dtype)
    if layout == "channels_last":
        made = made.to(memory_format=torch.channels_last)
    if layout == "gaps":
        made = torch.stack([made, made], -1)[..., 0]
    return made, rows


def live_sets(like: Tensor, rows: tuple[int, ...], layout: str, pattern: Pattern) -> Tensor:
    """Of every size, decided ones and a few empty ones among them."""
    viewed = as_rows(like, rows)
    leading = 1 + layout.startswith("experts")
    groups = viewed[(0,) * leading].numel() // pattern.m
    share = torch.rand(*viewed.shape[:leading], groups, 1) ** 2
    bits = torch.rand(*viewed.shape[:leading], groups, pattern.combinations) < share
    one = torch.nn.functional.one_hot(torch.randint(pattern.combinations, bits.shape[:-1]), pattern.combinations).bool()
    chance = torch.rand(*bits.shape[:-1], 1)
    return pack(torch.where(chance < 0.3, one, bits) & (chance < 0.98))


def same(found: Any, wanted: Any, *, computed: bool) -> bool:
    """Equal to the bit, strides included. computed: what is no number may be another one."""
    if isinstance(found, tuple):
        return all(same(f, w, computed=computed) for f, w in zip(found, wanted, strict=True))
    if found.stride() != wanted.stride() or found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    equal = found.view(whole) == wanted.view(whole)
    return bool((equal | (found.isnan() & wanted.isnan()) if computed else equal).all())


class Step(NamedTuple):
    """An op on tensors. computed: by arithmetic, so that what is no number may be another one; launches: of Triton kernels."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    computed: bool = False
    launches: int = 1


def steps(text: str, dtype: torch.dtype, layout: str, *, strange: bool) -> Iterator[Step]:
    """All ops on one weight."""
    pattern, nm = Pattern.parse(text), torch.ops.nm
    value, rows = weight(layout, pattern.m, dtype, strange=strange)
    grad, at = weight(layout, pattern.m, dtype, strange=strange)[0], list(rows)
    live, table = live_sets(value, rows, layout, pattern), byte_table(pattern)
    mask = torch.empty_like(value, dtype=torch.bool).copy_(torch.rand(value.shape) < 0.5)
    masked = torch.where(mask, value, 0)
    masked = torch.stack([masked, masked], -1)[..., 0] if layout == "gaps" else torch.empty_like(value).copy_(masked)
    dense = int(layout != "gaps")
    seen = int(layout not in ("gaps", "experts_inside"))  # these lie between the rows of others
    name = f"{text} {dtype} {layout}{' strange' * strange}"
    yield Step(f"live weight {name}", nm.score_weight, (value, value, live, table, 1, at, True))
    last = seen if dense else 1  # of one with gaps the mask alone
    yield Step(f"gradients {name}", nm.score_weight_backward, (grad, value, live, table, 1, at, True), True, last)
    yield Step(f"live mask {name}", nm.live_mask, (live, table, list(value.shape), at), False, seen if dense else 1)
    yield Step(f"fixed mask {name}", nm.masked_weight, (value, mask), False, dense)
    for amount in (2e-4, 0.3):
        yield Step(f"decay {amount} {name}", decayed, (grad, value, masked, amount), True, dense)
    batch = int(layout.startswith("experts"))
    sizes = as_rows(value, rows).shape
    if sizes[batch] % pattern.m == 0 and seen:
        order = torch.rand(sizes[: batch + 1]).argsort(-1)
        yield Step(f"backward weight {name}", nm.backward_weight, (value, order, pattern.n, pattern.m, at))


def of(text: str, dtype: torch.dtype, layout: str, *, strange: bool) -> Iterator[Case]:
    """Whether kernels and torch agree, and how many kernels there were."""
    for step in steps(text, dtype, layout, strange=strange):
        with torch.no_grad():
            with by_torch():
                wanted = step.call(*step.arguments)
            with on_gpu() as launched:
                found = step.call(*step.arguments)
        yield step.name, same(found, wanted, computed=step.computed) and len(launched) == step.launches


def cases() -> Iterator[Case]:
    """Dtypes and layouts at 2:4, then the other patterns."""
    for dtype in FLOATS:
        yield from of("2:4", dtype, "channels_last", strange=True)
    yield from of("2:4", torch.float64, "linear", strange=False)
    for layout in LAYOUTS:
        yield from of("2:4", torch.bfloat16, layout, strange=layout != "conv")
    for text, layouts in (("1:4", ("linear",)), ("4:8", ("linear", "conv")), ("1:16", ("transposed",)), ("3:5", LAYOUTS[:3])):
        for layout in layouts:
            yield from of(text, torch.float32, layout, strange=True)
    yield from of("2:4", torch.bfloat16, "large", strange=True)
    yield from of("4:8", torch.float16, "large", strange=True)
    yield from of("2:4", torch.float32, "gaps", strange=True)


def work(call: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """The result, and what it took on the device, in order: kernels, and operations of torch that move numbers."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = call(*arguments)
    found = []
    for event in profiler.events():
        above, inside = event.cpu_parent, False
        while above is not None:
            inside, above = inside or above.name == LAUNCH, above.cpu_parent
        if not inside and (event.name == LAUNCH or event.name.startswith("aten::")) and event.name not in MOVES_NOTHING:
            found.append(event.name)
    return result, found


def one_launch(layout: str) -> Iterator[Case]:
    nm, pattern = torch.ops.nm, Pattern(2, 4)
    value, rows = weight(layout, 4, torch.bfloat16, strange=False)
    given, at = value.clone().requires_grad_(), list(rows)
    scores, grad, order = torch.rand_like(value).requires_grad_(), torch.rand_like(value), torch.randperm(len(value))
    live, table = live_sets(value, rows, layout, pattern), byte_table(pattern)
    mask = torch.empty_like(value, dtype=torch.bool).copy_(torch.rand(value.shape) < 0.5)
    differentiable: list[tuple[str, Any, tuple[Any, ...], list[Tensor]]] = [
        ("score_weight", nm.score_weight, (given, scores, live, table, 1, at, True), [given, scores]),
        ("score_weight, scores fixed", nm.score_weight, (given, scores.detach(), live, table, 1, at, True), [given]),
        ("srste_weight", nm.srste_weight, (given, 2, 4, 1, 2e-4), [given]),
        ("masked_weight", nm.masked_weight, (given, mask), [given]),
        *([("two_masks", nm.two_masks, (given, order, 2, 4, 2e-4), [given])] if layout == "linear" else []),
    ]
    for name, op, arguments, inputs in differentiable:
        result, forward = work(op, *arguments)
        _, backward = work(torch.autograd.grad, result[0] if name == "two_masks" else result, inputs, grad)
        yield f"one launch each way: {name} {layout}", [*forward, *backward] == [LAUNCH, LAUNCH]
    others = {nm.backward_weight: (value, order, 2, 4, at), nm.backward_groups: (value, 2, 4, 0)}
    for op, arguments in (others | {nm.live_mask: (live, table, list(value.shape), at)}).items():
        yield f"one launch: {op} {layout}", work(op, *arguments)[1] == [LAUNCH]


def counts() -> Iterator[Case]:
    """One forward and one backward of each op are a kernel each, and nothing else."""
    with on_gpu():
        yield from one_launch("linear")
        yield from one_launch("channels_last")
