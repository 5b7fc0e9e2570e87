"""What LBC does with packed live sets in every step, on a GPU, each in one pass over memory: for `nm_compiler.solvers.gpu`.

A program looks at the live sets of some groups. A position is covered if its group has a live bit among those of the
combinations that have the position, so the table is read once a program and nothing is gathered from it. Importing this
module needs triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nm_compiler.solvers.floats_triton import is_brain, rounded, storable, wide
from nm_compiler.solvers.sweeps import Lying

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMBERS = 2048  # of a program


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _positions(group, total, inner, m: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the entries of groups lie, ``[block, width]``, and which are there. width: m, up to a power of two."""
    entry = tl.arange(0, width)
    place = ((group // inner) * m * inner + group % inner)[:, None] + (entry * inner)[None, :]
    return place, (group < total)[:, None] & (entry < m)[None, :]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _look(live, table, group, total, groups, inner, length, m: tl.constexpr, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Of live sets of ``length`` bytes: not 0 where a position is covered, ``[block, width]``, and where a group has a choice.

    Groups are numbered as a weight ``[total / (groups * inner), groups, M, inner]`` has them.
    """
    unit = group // inner
    sets = ((unit // groups) * inner + group % inner) * groups + unit % groups
    entry = tl.arange(0, width)
    hit = tl.zeros([block, width], tl.int32)
    seen = tl.zeros([block], tl.int32)
    several = tl.zeros([block], tl.int32)
    for byte in range(length):
        members = tl.zeros([width], tl.int32)  # the combinations of this byte that have the position
        for combination in tl.static_range(8):
            row = (byte * 256 + (1 << combination)) * m
            has = tl.load(table + row + entry, mask=entry < m, other=0).to(tl.int32)
            members = members | ((has != 0).to(tl.int32) << combination)
        value = tl.load(live + sets * length + byte, mask=group < total, other=0).to(tl.int32)
        hit = hit | (value[:, None] & members[None, :])
        several = several | (value & (value - 1)) | ((seen != 0) & (value != 0)).to(tl.int32)
        seen = seen | value
    return hit, several


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cover(source, live, table, target, total, groups, inner, length, m: tl.constexpr, width: tl.constexpr, block: tl.constexpr, values: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """source: the weight's bits as whole numbers (values), which target gets where covered; else target gets bytes 0 or 1."""
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    place, there = _positions(group, total, inner, m, width)
    hit, _several = _look(live, table, group, total, groups, inner, length, m, width, block)
    if values:
        tl.store(target + place, tl.where(hit != 0, tl.load(source + place, mask=there, other=0), 0), mask=there)
    else:
        tl.store(target + place, (hit != 0).to(tl.uint8), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _differentiate(grad, weight, live, table, first, second, total, groups, inner, length, m: tl.constexpr, width: tl.constexpr, block: tl.constexpr, brain: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """first: grad where covered, else 0; second: the weight times that, rounded, then times 0 where a group has no choice."""
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    place, there = _positions(group, total, inner, m, width)
    hit, several = _look(live, table, group, total, groups, inner, length, m, width, block)
    dtype: tl.constexpr = second.dtype.element_ty
    given = tl.load(grad + place, mask=there, other=0)
    through = tl.where(hit != 0, given, tl.zeros([block, width], dtype))
    tl.store(first + place, through, mask=there)
    own = wide(tl.load(weight + place, mask=there, other=0), brain)
    moved = wide(rounded(own * wide(through, brain), dtype, brain), brain)
    choice = tl.where(several != 0, 1.0, 0.0)  # not a condition: what is infinite becomes NaN, as it does in torch
    tl.store(second + place, rounded(moved * choice[:, None], dtype, brain), mask=there)


def cover(live: Tensor, table: Tensor, at: Lying, mask: Tensor) -> None:
    """Write the union of live combinations to ``mask``, bool.

    All without gaps; ``at`` says how the weight lies. live: uint8 ``[outer, inner, groups, bytes]``, contiguous; table: uint8
    ``[bytes, 256, M]``, contiguous, from `byte_table`.
    """
    target = mask.view(torch.uint8)
    _launch(_cover, live, table, at, (target, live, table, target), values=False)


def covered(weight: Tensor, live: Tensor, table: Tensor, at: Lying, out: Tensor) -> None:
    """Write the weight where a live combination covers it, else 0, to the bit. weight, out: of 2, 4 or 8 bytes a number."""
    whole = _WHOLE[weight.element_size()]
    _launch(_cover, live, table, at, (weight.view(whole), live, table, out.view(whole)), values=True)


def gradients(grad: Tensor, weight: Tensor, live: Tensor, table: Tensor, at: Lying, results: tuple[Tensor, Tensor]) -> None:
    """Write dW = g where a live combination covers it and dS = W * dW, zero where a group is decided; all of one dtype.

    As `nm_compiler.ops.weights.score_weight_backward` does in torch, what is not finite included.
    """
    g, w, dw, ds = (storable(tensor) for tensor in (grad, weight, *results))
    _launch(_differentiate, live, table, at, (g, w, live, table, dw, ds), brain=is_brain(weight))


def _launch(kernel: Any, live: Tensor, table: Tensor, at: Lying, tensors: tuple[Tensor, ...], **rest: bool) -> None:
    m = table.shape[-1]
    width, total = 1 << (m - 1).bit_length(), at.outer * at.groups * at.inner
    block = max(1, _NUMBERS // width)
    sizes = {"total": total, "groups": at.groups, "inner": at.inner, "length": live.shape[-1]}
    kernel[(-(-total // block),)](*tensors, **sizes, m=m, width=width, block=block, **rest)
