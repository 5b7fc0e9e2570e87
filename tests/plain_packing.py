"""cuSPARSELt's layout of a packed 16-bit weight (`nm_compiler.runtime.cusparselt.layout`), in torch operations, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from nm_compiler.runtime.cusparselt.layout import packed_shape


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
