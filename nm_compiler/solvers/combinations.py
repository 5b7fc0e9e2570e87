"""LBC's live sets: which combinations of a group may still win, and how the lowest-scored are retired.

A live set has one of three forms, all with the leading axes ``[*batch, out, groups per row]`` (batch: experts, or none):

    packed      uint8 [.., ceil(C / 8)]   one bit per combination, table [ceil(C / 8), 256, M]   (position layout)
    unpacked    uint8 [.., C]             one byte per combination, table [C, M]                 (combination layout)
    positions   uint8 [.., M]             one byte per position, table eye(M)                    (C > 1820)

The table's number of axes tells packed from the other two. Ref: LBC, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nm_compiler.pattern import Pattern, combination_table

_CHUNK = 1 << 22  # numbers in flight while combinations are ranked: 16 MiB of float32


def pack(bits: Tensor) -> Tensor:
    """bool or 0/1 ``[.., K]`` to uint8 ``[.., ceil(K / 8)]``, bit ``k % 8`` of byte ``k // 8``."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    packed: Tensor = (padded * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack`: uint8 ``[.., ceil(length / 8)]`` to bool ``[.., length]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :length].bool()


def byte_table(pattern: Pattern) -> Tensor:
    """For every byte of a packed live set and every value of it, the union of its combinations.

    Returns uint8 ``[ceil(C / 8), 256, M]``. Raises NMError if C > 1820.
    """
    table = combination_table(pattern)
    padded = torch.nn.functional.pad(table, (0, 0, 0, -len(table) % 8)).unflatten(0, (-1, 8))
    values = unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 8)  # [256, 8]
    unions: Tensor = (values[None, :, :, None] & padded[:, None].bool()).any(2)
    return unions.to(torch.uint8)


def union(live: Tensor, table: Tensor) -> Tensor:
    """The positions that some live entry covers. Returns bool ``[.., M]``."""
    if table.ndim == 2:
        return (live.to(torch.float32) @ table.to(torch.float32)) > 0
    m = table.shape[-1]
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(m)
    if word is not None:  # a group of masks is one machine word: one gather and one OR a byte
        words = table.view(word).squeeze(-1)
        covered = words[0][live[..., 0].long()]
        for byte in range(1, live.shape[-1]):
            covered = covered | words[byte][live[..., byte].long()]
        return covered.unsqueeze(-1).view(torch.bool)
    covered = table[0][live[..., 0].long()]
    for byte in range(1, live.shape[-1]):
        covered = covered | table[byte][live[..., byte].long()]
    return covered.bool()


def count(live: Tensor, *, packed: bool) -> Tensor:
    """How many entries of each group are live. Returns int64, ``live`` without its last axis."""
    return (unpack(live, 8 * live.shape[-1]) if packed else live).sum(-1)


def undecided(live: Tensor, *, packed: bool, last: int) -> Tensor:
    """Whether a group still has a choice: more than ``last`` live entries. Returns bool, ``live`` without its last axis."""
    if packed and last == 1:  # more than one bit set in a byte, or more than one byte with a bit
        several = (live & (live - 1)) != 0
        return several.squeeze(-1) if live.shape[-1] == 1 else several.any(-1) | ((live != 0).sum(-1) > 1)
    return count(live, packed=packed) > last


def retire(scores: Tensor, live: Tensor, table: Tensor, *, keep: int, by_position: bool) -> Tensor:
    """Keep the ``keep`` highest-scored live entries of every group; among equals the first in order stays.

    scores: ``[*batch, out, *taps, in]`` rows of position scores (by_position), else ``[*batch, out, groups per row, C]``.
    table: uint8 ``[C, M]`` (or eye(M)), also where ``live`` is packed. A NaN score ranks lowest.
    Returns a new live set of the same form; an entry that was not live never comes back.
    """
    entries, m = table.shape
    packed = live.shape[-1] != entries
    flat_scores, flat_live = scores.reshape(-1, m if by_position else entries), live.flatten(0, -2)
    kept = torch.empty_like(flat_live)
    combos = table.to(scores.dtype).T
    step = max(1, _CHUNK // entries)
    for start in range(0, len(flat_live), step):
        part = slice(start, start + step)
        alive = unpack(flat_live[part], entries) if packed else flat_live[part].bool()
        lowest = torch.finfo(scores.dtype).min  # of a live one: NaN and -inf still beat what has retired
        finite = flat_scores[part].nan_to_num(nan=lowest)  # or a position would spoil combinations that lack it
        total = finite @ combos if by_position else finite
        total = torch.where(alive, total.nan_to_num(nan=lowest), -torch.inf)
        best = total.argsort(dim=-1, descending=True, stable=True)[..., :keep]
        chosen = torch.zeros_like(alive).scatter_(-1, best, True) & alive
        kept[part] = pack(chosen) if packed else chosen.to(torch.uint8)
    return kept.view_as(live)
