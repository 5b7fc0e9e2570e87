# mypy: disable-error-code="assignment"
"""Magnitude masks on a GPU in one pass over memory, for `nm_compiler.solvers.masks`.

Entry j of a group has as rank how many entries beat it, those that are larger, and equal ones before it. Where `groups_triton`
can, a thread ranks whole groups in registers: of neighbours, loaded and stored as whole words, or of entries ``inner`` apart,
next to which other threads load theirs. Other groups, of other M or of float64, are ranked by a program together.
Importing this module needs triton, which CUDA builds of torch bring along. weight: float16, bfloat16, float32 or float64, any
strides; results agree with `magnitude_mask` to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nm_compiler.solvers.groups_triton import (
    RANKED,
    SIZES,
    WORDS,
    is_kept,
    kept_of,
    load_words,
    masked_words,
    store_words,
    values_of,
    wide,
)

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPARED = 8192  # pairs of entries that one program compares at once
_BYTES = {4: torch.int32, 8: torch.int64, 16: torch.int64}  # how the mask of a unit is stored
_WARPS = 4
_NEIGHBOURS = 16384  # bytes of neighbouring groups that one program loads
_APART = 4096  # entries of groups apart that one program loads


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rank_groups(source, target, groups, inner, largest, n, m: tl.constexpr, width: tl.constexpr, block: tl.constexpr, keep_weight: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """source: the weight's bits as whole numbers; target: of the same type (keep_weight), or one byte an entry.

    Entry j of group g lies at ``(g // inner) * m * inner + g % inner + j * inner``. width: m, up to a power of two.
    """
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    entry = tl.arange(0, width)
    place = ((group // inner) * m * inner + group % inner)[:, None] + (entry * inner)[None, :]
    there = (group < groups)[:, None] & (entry < m)[None, :]
    bits = tl.load(source + place, mask=there, other=0)
    value = tl.where(there, bits & largest, -1)
    mine, other = value[:, :, None], value[:, None, :]
    first = (entry[None, :] < entry[:, None])[None, :, :]
    rank = tl.sum(((other > mine) | ((other == mine) & first)).to(tl.int32), axis=2)
    kept = rank < n
    if keep_weight:
        tl.store(target + place, tl.where(kept, bits, 0), mask=there)
    else:
        tl.store(target + place, kept.to(tl.uint8), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rank_neighbours(source, target, units, n: tl.constexpr, m: tl.constexpr, width: tl.constexpr, size: tl.constexpr, block: tl.constexpr, keep_weight: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """source: int64, units of ``width`` entries of ``size`` bytes; target: int64 (keep_weight), or one byte an entry.

    For masks of units of four, target is int32.
    """
    unit = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = unit < units
    words = load_words(source, unit, there, width * size // 8)
    kept = kept_of(values_of(words, width, size), n, m)
    if keep_weight:
        store_words(target, unit, there, masked_words(words, kept, width * size // 4, size), width * size // 8)
    elif width == 4:
        tl.store(target + unit, kept[0], mask=there)
    else:
        store_words(target, unit, there, kept, width // 8)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rank_apart(source, target, groups, inner, n: tl.constexpr, m: tl.constexpr, size: tl.constexpr, block: tl.constexpr, keep_weight: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """As `_rank_groups`, for entries of ``size`` bytes, ``m`` from 4 on."""
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = group < groups
    place = (group // inner) * m * inner + group % inner
    entries, values = (), ()
    for at in tl.static_range(m):
        bits = tl.load(source + place + at * inner, mask=there, other=0)
        entries += (bits,)
        values += (bits.to(tl.int32) & (0x7FFFFFFF if size == 4 else 0x7FFF),)
    kept = kept_of(values, n, m)
    for at in tl.static_range(m):
        if keep_weight:
            tl.store(target + place + at * inner, tl.where(is_kept(kept, at) != 0, entries[at], 0), mask=there)
        else:
            tl.store(target + place + at * inner, is_kept(kept, at).to(tl.uint8), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack_rows(mask, target, length, width, total, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight entries of the last axis to a byte, the first in the lowest bit. length: entries, width: bytes of a row."""
    byte = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    column = (byte % width)[:, None] * 8 + tl.arange(0, 8)[None, :]
    there = (byte < total)[:, None] & (column < length)
    bits = tl.load(mask + (byte // width)[:, None] * length + column, mask=there, other=0).to(tl.int32)
    tl.store(target + byte, tl.sum(bits << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8), mask=byte < total)


def mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """uint8 of the weight's shape, and of its strides unless it has gaps: 1 at the ``n`` largest of every ``m``."""
    return _ranked(weight, n, m, axis, keep_weight=False)


def masked(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """The weight with zeros where `mask` has them: of its shape and dtype, and of its strides unless it has gaps."""
    return _ranked(weight, n, m, axis, keep_weight=True)


def bits(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """The mask with its last axis packed: uint8 ``[.., ceil(last / 8)]``."""
    plain = mask(weight, n, m, axis).contiguous()
    length = plain.shape[-1]
    width = -(-length // 8)
    packed = torch.empty((*plain.shape[:-1], width), dtype=torch.uint8, device=weight.device)
    if packed.numel():
        _pack_rows[(-(-packed.numel() // 512),)](plain, packed, length, width, packed.numel(), block=512)
    return packed


def _ranked(weight: Tensor, n: int, m: int, axis: int, *, keep_weight: bool) -> Tensor:
    far_first = sorted(range(weight.ndim), key=weight.stride, reverse=True)  # the order in which they lie in memory
    ordered = weight.detach().permute(far_first).contiguous()  # a copy only where there are gaps or overlaps
    back = [far_first.index(a) for a in range(weight.ndim)]
    inner = ordered.shape[far_first.index(axis % weight.ndim) + 1 :].numel()
    result = torch.empty_like(ordered) if keep_weight else torch.empty_like(ordered, dtype=torch.uint8)
    if weight.numel():
        _launch(ordered, result, inner, n, m, keep_weight)
    return result.permute(back)


def _launch(given: Tensor, result: Tensor, inner: int, n: int, m: int, keep_weight: bool) -> None:
    """given, result: contiguous, the entries of a group ``inner`` apart."""
    size = given.element_size()
    if size in SIZES and m in RANKED and inner == 1 and given.numel() % wide(m) == 0:
        _launch_neighbours(given, result, n, m, keep_weight)
        return
    whole, groups = _WHOLE[size], given.numel() // m
    target = result.view(whole) if keep_weight else result
    if size in SIZES and m in RANKED[1:] and inner > 1:
        block = _APART // m
        _rank_apart[(-(-groups // block),)](
            given.view(whole), target, groups, inner, n, m, size=size, block=block, keep_weight=keep_weight, num_warps=_WARPS
        )  # fmt: skip
        return
    width = 1 << (m - 1).bit_length()
    block = max(1, min(256, _COMPARED // width**2))
    _rank_groups[(-(-groups // block),)](
        given.view(whole), target, groups, inner, torch.iinfo(whole).max, n,
        m=m, width=width, block=block, keep_weight=keep_weight,
    )  # fmt: skip


def _launch_neighbours(given: Tensor, result: Tensor, n: int, m: int, keep_weight: bool) -> None:
    """Threads load and store up to 16 bytes at once, where the weight begins at a multiple of that."""
    if given.data_ptr() % 16:
        given = given.clone()
    width, size = wide(m), given.element_size()
    units = given.numel() // width
    block = _NEIGHBOURS // (width * size)
    _rank_neighbours[(-(-units // block),)](
        given.view(-1).view(WORDS), result.view(-1).view(WORDS if keep_weight else _BYTES[width]), units, n, m,
        width=width, size=size, block=block, keep_weight=keep_weight, num_warps=_WARPS,
    )  # fmt: skip
