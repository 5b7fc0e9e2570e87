"""From an N:M weight to what the kernels read.

    weight [out, in / conv groups, *taps]  ->  values [conv groups, tiles, steps, 16]   of dtype
                                               codes  [conv groups, tiles, words, 16]   int32
                                               scales [conv groups, tiles, 16]          float32, int8 values only

A tile is 16 rows of a conv group (the last is filled up with zeros); a step is one kept position of each of the 16 rows,
n steps a group, groups along ``[*taps, in]``. A code is the position inside its group, in 2, 4 or 8 bits, the first step in
the low bits of a word. 2:4 in float32: 4.25 bytes a non-zero, 0.53 of dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.job import DTYPES
from nm_compiler.solvers.check import worst_group

LANES = 16
"""Rows of a tile: ``NM_LANES`` in job.h."""
MOST_M = 32
_AT_ONCE = 1 << 17  # weights that are packed at a time: the places of each take some 50 bytes


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight. shape: of the dense one; pattern, conv_groups: it was packed with."""

    values: Tensor
    codes: Tensor
    scales: Tensor | None
    shape: tuple[int, ...]
    pattern: Pattern
    conv_groups: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in (self.values, self.codes, self.scales) if tensor is not None)


def code_bits(m: int) -> int:
    """Bits of the code of a position in a group of ``m``."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def sizes(shape: tuple[int, ...], pattern: Pattern, conv_groups: int) -> tuple[int, int, int]:
    """tiles, steps, words of a weight of ``shape``."""
    steps = math.prod(shape[1:]) // pattern.m * pattern.n
    return -(-shape[0] // conv_groups // LANES), steps, -(-steps * code_bits(pattern.m) // 32)


def packed_bytes(shape: tuple[int, ...], pattern: Pattern, conv_groups: int, dtype: torch.dtype) -> int:
    """Bytes of a packed weight of ``shape``, without packing it. dtype: of its values."""
    tiles, steps, words = sizes(shape, pattern, conv_groups)
    scale = 4 if dtype == torch.int8 else 0
    return conv_groups * tiles * LANES * (steps * dtype.itemsize + words * 4 + scale)


def pack(weight: Tensor, pattern: Pattern, *, conv_groups: int = 1, dtype: torch.dtype = torch.float32) -> Packed:
    """Pack a weight ``[out, in / conv groups, *taps]`` that is N:M along axis 1; on the CPU, nothing is changed.

    dtype: of the values: float32, bfloat16 (rounded), or int8 (one scale a row, rounded to nearest: about 1 % of the norm).
    Raises NMError if it is not N:M, if M is more than 32, or for another dtype.
    """
    m, n = pattern.m, pattern.n
    given = f"a weight of {list(weight.shape)}"
    if m > MOST_M:
        raise NMError(f"{given}: the CPU kernels take M up to {MOST_M}, not {pattern}")
    if dtype not in DTYPES:
        raise NMError(f"{given}: packed values are float32, bfloat16 or int8, not {dtype}")
    if weight.ndim < 2 or weight.shape[1] % m or weight.shape[0] % conv_groups:
        raise NMError(f"{given} cannot be packed: groups of {m} along axis 1, {conv_groups} conv groups along axis 0")
    fullest = worst_group(weight, m, 1)
    if fullest > n:
        raise NMError(f"{given} is not {pattern} along axis 1: a group has {fullest} non-zeros. nm.freeze makes it so")
    shape = tuple(weight.shape)
    tiles, steps, words = sizes(shape, pattern, conv_groups)
    values = torch.empty(conv_groups, tiles, steps, LANES, dtype=dtype, device="cpu")
    codes = torch.empty(conv_groups, tiles, words, LANES, dtype=torch.int32, device="cpu")
    scales = torch.empty(conv_groups, tiles, LANES, dtype=torch.float32, device="cpu") if dtype == torch.int8 else None
    by_group = weight.detach().unflatten(0, (conv_groups, shape[0] // conv_groups))
    at_once = max(1, _AT_ONCE // max(1, conv_groups * LANES * weight[:1].numel()))
    for first in range(0, tiles, at_once):
        part = by_group[:, first * LANES : (first + at_once) * LANES]
        here = slice(first, first + at_once)
        found, codes[:, here] = _packed_tiles(part, n, m)
        if scales is not None:
            scales[:, here] = found.abs().amax(2) / 127 if steps else 0.0
            found = (found / scales[:, here].clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)).round()
        values[:, here] = found
    return Packed(values, codes, scales, shape, pattern, conv_groups)


def _packed_tiles(part: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Values, float32, and codes of some rows of each conv group: ``[conv groups, rows, in, *taps]``."""
    rows = part.shape[1]
    flat = part.flatten(3).movedim(2, -1) if part.ndim > 3 else part
    grouped = flat.reshape(*part.shape[:2], -1, m)
    # non-zeros first, both parts in order; then the places that are kept in order again
    places = (grouped != 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
    return _lanes(grouped.gather(-1, places).float(), rows), _words(_lanes(places, rows), code_bits(m))


def _lanes(tensor: Tensor, rows: int) -> Tensor:
    """``[conv groups, rows, groups, n]`` to ``[conv groups, tiles, steps, 16]``."""
    flat = tensor.flatten(2)
    tiles = -(-rows // LANES)
    filled: Tensor = torch.nn.functional.pad(flat, (0, 0, 0, tiles * LANES - rows))
    tiled: Tensor = filled.unflatten(1, (tiles, LANES)).transpose(2, 3)
    return tiled.contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    a_word = 32 // bits
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[2] % a_word))
    parts = filled.unflatten(2, (-1, a_word)) << torch.arange(0, 32, bits, device="cpu").view(-1, 1)
    words = parts.sum(3)
    signed: Tensor = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed
