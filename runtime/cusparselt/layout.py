"""How cuSPARSELt lays out a packed 16-bit weight on Hopper, in torch operations: what the kernels of `pack_triton` write.

    kept values    [out, in / 2] in rows, two of every four neighbours
    their places   four bits a group: two for the first value, two for the second above them

The places lie in tiles of 64 rows and 32 columns, a band of tiles after the other, and in a tile from the lowest index on:

    row + 8 | group + 4 | group + 1, 2 | row + 1, 2, 4 | row + 16, 32

A group with fewer than two non-zeros is filled up: its first place is that of its first non-zero among entries 0 to 2, else 2;
its second that of its second non-zero, else 3. Read off what the library packed on an H200 (cuSPARSELt 0.8, torch 2.11).
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 64
"""What rows and columns have to be multiples of: other sizes are padded by the library, which is not followed here."""


def packed_shape(out: int, inputs: int) -> tuple[int, int]:
    """Of the packed tensor."""
    return out, inputs * 9 // 16


def pack_plainly(weight: Tensor) -> Tensor:
    """weight: ``[out, in]``, 16 bits a number, both multiples of `STEP`, at most 2 of 4 along `in` non-zero.

    Returns the packed tensor, ``[out, in * 9 / 16]`` of the same dtype.
    """
    groups = weight.detach().contiguous().view(torch.int16).unflatten(1, (-1, 4))  # bits: what is no number stays as it is
    first, second = _places((groups & 0x7FFF) != 0)
    kept = groups.gather(2, torch.stack((first, second), 2))
    codes = first + 4 * second
    bytes_ = torch.cat((kept.flatten().view(torch.uint8), _tiled(codes.to(torch.uint8))))
    return bytes_.view(weight.dtype).view(packed_shape(*weight.shape))


def _places(given: Tensor) -> tuple[Tensor, Tensor]:
    """given: bool ``[.., 4]``, at most two of them. Returns int64 ``[..]`` twice."""
    a, b, c, _ = given.unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    return first, torch.where(a & b, 1, torch.where((a | b) & c, 2, 3))


def _tiled(codes: Tensor) -> Tensor:
    """codes: uint8 ``[out, groups]``, four bits each. Returns them as the library has them, two a byte."""
    rows, groups = codes.shape
    tiles = codes.view(rows // 64, 4, 2, 8, groups // 8, 2, 2, 2)
    bits = tiles.permute(0, 4, 1, 3, 6, 7, 5, 2).reshape(-1, 2)
    return bits[:, 0] | bits[:, 1] << 4
