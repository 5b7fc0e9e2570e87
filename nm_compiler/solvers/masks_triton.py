"""Magnitude masks on a GPU in one pass over memory, for `nm_compiler.solvers.masks`.

A program ranks whole groups: entry j of a group has as rank how many entries beat it, those that are larger, and equal ones
before it. Importing this module needs triton, which CUDA builds of torch bring along. weight: float16, bfloat16, float32 or
float64, any strides; results agree with `magnitude_mask` to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPARED = 8192  # pairs of entries that one program compares at once


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
    """The weight with zeros where `mask` has them."""
    return _ranked(weight, n, m, axis, keep_weight=True)


def bits(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """The mask with its last axis packed: uint8 ``[.., ceil(last / 8)]``."""
    plain = mask(weight, n, m, axis).contiguous()
    length = plain.shape[-1]
    width = -(-length // 8)
    packed = torch.empty((*plain.shape[:-1], width), dtype=torch.uint8, device=weight.device)
    if packed.numel():
        _pack_rows[(triton.cdiv(packed.numel(), 512),)](plain, packed, length, width, packed.numel(), block=512)
    return packed


def _ranked(weight: Tensor, n: int, m: int, axis: int, *, keep_weight: bool) -> Tensor:
    far_first = sorted(range(weight.ndim), key=weight.stride, reverse=True)  # the order in which they lie in memory
    ordered = weight.detach().permute(far_first).contiguous()  # a copy only where there are gaps or overlaps
    back = [far_first.index(a) for a in range(weight.ndim)]
    inner = ordered.shape[far_first.index(axis % weight.ndim) + 1 :].numel()
    result = torch.empty_like(ordered) if keep_weight else torch.empty_like(ordered, dtype=torch.uint8)
    if weight.numel():
        groups, width = weight.numel() // m, triton.next_power_of_2(m)
        block = max(1, min(256, _COMPARED // width**2))
        whole = _WHOLE[weight.element_size()]
        target = result.view(whole) if keep_weight else result
        _rank_groups[(triton.cdiv(groups, block),)](
            ordered.view(whole), target, groups, inner, torch.iinfo(whole).max, n,
            m=m, width=width, block=block, keep_weight=keep_weight,
        )  # fmt: skip
    return result.permute(back)
