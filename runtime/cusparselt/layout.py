"""How cuSPARSELt lays out a packed 16-bit weight on Hopper: what the kernels of `pack_triton` write.

    kept values    [out, in / 2] in rows, two of every four neighbours
    their places   four bits a group: two for the first value, two for the second above them

The places lie in tiles of 64 rows and 32 columns, a band of tiles after the other, and in a tile from the lowest index on:

    row + 8 | group + 4 | group + 1, 2 | row + 1, 2, 4 | row + 16, 32

A group with fewer than two non-zeros is filled up: its first place is that of its first non-zero among entries 0 to 2, else 2;
its second that of its second non-zero, else 3. Read off what the library packed on an H200 (cuSPARSELt 0.8, torch 2.11).
"""

from __future__ import annotations

STEP = 64
"""What rows and columns have to be multiples of: other sizes are padded by the library, which is not followed here."""


def packed_shape(out: int, inputs: int) -> tuple[int, int]:
    """The shape of the packed tensor of a weight ``[out, inputs]``."""
    return out, inputs * 9 // 16
