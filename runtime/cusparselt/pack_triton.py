"""Pack a 16-bit weight that is 2:4 already as cuSPARSELt does on Hopper, in one pass over memory.

The layout is that of `layout`. A thread packs eight columns of two rows, whose places share a byte; places of threads beside
each other are added up to whole words. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nm_compiler.runtime.cusparselt.layout import packed_shape
from nm_compiler.solvers.groups_triton import WORDS, joined, load_words

ROWS = 16, 8
"""Pairs of rows and units of eight columns that one program packs."""
_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _compressed(low, high):  # type: ignore[no-untyped-def]
    """Four entries of 2 bytes, at most two non-zero. Returns the two values that are kept, as one word, and four bits."""
    a, b, c = (low & 0x7FFF) != 0, (low & 0x7FFF0000) != 0, (high & 0x7FFF) != 0
    upper_b, upper_d = (low >> 16) & 0xFFFF, (high >> 16) & 0xFFFF
    lower_c = high & 0xFFFF
    first = tl.where(a, low & 0xFFFF, tl.where(b, upper_b, lower_c))
    second = tl.where(a & b, upper_b, tl.where((a | b) & c, lower_c, upper_d))
    code = tl.where(a, 0, tl.where(b, 1, 2)) | tl.where(a & b, 4, tl.where((a | b) & c, 8, 12))
    return first | (second << 16), code


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack_rows(source, values, places, out, inputs, down: tl.constexpr, across: tl.constexpr):  # type: ignore[no-untyped-def]
    """source: int64 ``[out, inputs / 4]``; values: int64 ``[out, inputs / 8]``; places: int32."""
    at = tl.arange(0, down * across)
    unit = tl.program_id(1) * across + (at & (across - 1))
    pair = tl.program_id(0).to(tl.int64) * down + at // across
    units = inputs // 8
    there = (unit < units) & (pair < out // 2)
    row = (pair >> 3) * 16 + (pair & 7)
    upper = load_words(source, row * units + unit, there, 2)
    lower = load_words(source, (row + 8) * units + unit, there, 2)
    even, code = _compressed(upper[0], upper[1])
    odd, beside = _compressed(upper[2], upper[3])
    tl.store(values + row * units + unit, joined(even, odd), mask=there)
    code |= beside << 16
    even, below = _compressed(lower[0], lower[1])
    odd, beside = _compressed(lower[2], lower[3])
    tl.store(values + (row + 8) * units + unit, joined(even, odd), mask=there)
    code |= (below << 4) | (beside << 20)
    code = tl.reshape(code << (8 * ((unit >> 1) & 1)), (down, across // 4, 2, 2))
    code = tl.reshape(tl.sum(code, axis=2), (down * across // 2,))
    at = tl.arange(0, down * across // 2)
    unit = tl.program_id(1) * across + ((at & (across // 2 - 1)) >> 1) * 4 + (at & 1)
    pair = tl.program_id(0).to(tl.int64) * down + at // (across // 2)
    place = ((pair >> 5) * (units // 4) + (unit >> 2)) * 64 + (pair & 31) * 2 + (unit & 1)
    tl.store(places + place, code, mask=(unit < units) & (pair < out // 2))


def packed(weight: Tensor) -> Tensor:
    """weight: ``[out, in]``, float16 or bfloat16, both multiples of `layout.STEP`, at most 2 of 4 along `in` non-zero.

    Returns ``[out, in * 9 / 16]`` of the same dtype.
    """
    given = weight.detach().contiguous()
    given = given.clone() if given.data_ptr() % 16 else given
    (out, inputs), (down, across) = weight.shape, ROWS
    result = weight.new_empty(packed_shape(out, inputs))
    kept, places = result.view(-1).tensor_split([out * inputs // 2])
    _pack_rows[(-(-out // (2 * down)), -(-inputs // (8 * across)))](
        given.view(WORDS), kept.view(WORDS), places.view(torch.int32), out, inputs, down=down, across=across, num_warps=_WARPS,
    )  # fmt: skip
    return result
