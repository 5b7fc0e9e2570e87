# mypy: disable-error-code="assignment"
"""Blocks of a weight in registers, for Triton kernels: a thread loads some rows of whole groups and turns them by itself.

As `groups_triton` for groups along rows and then down columns. A block of ``lines`` rows is one tuple of words, row after row.
Which block a place of the program's tile has is written with ``&``, so that neighbours are seen as places apart: then every
tensor of the program has the same place in the same thread, and nothing goes through shared memory.
Importing this module needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nm_compiler.solvers.groups_triton import load_words


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_rows(source, order, first, across, units, there, lines: tl.constexpr, count: tl.constexpr, ordered: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """``lines`` rows from place ``first`` on, each unit ``across`` of ``units``, and which rows of the weight those are.

    source: int64, ``count`` of them a unit; order: int64, the row at each place (ordered), else not read.
    """
    rows, words = (), ()
    for line in tl.static_range(lines):
        if ordered:
            rows += (tl.load(order + first + line, mask=there, other=0),)
        else:
            rows += (first + line,)
    for line in tl.static_range(lines):
        words += load_words(source, rows[line] * units + across, there, count)
    return rows, words


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def row_of(block, line: tl.constexpr, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of a block of ``count`` words a row."""
    words = ()
    for at in tl.static_range(count):
        words += (block[line * count + at],)
    return words


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def column_of(block, column: tl.constexpr, lines: tl.constexpr, count: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """One column of a block of ``count`` words a row, as words of its own. size: bytes of an entry."""
    words = ()
    if size == 4:
        for line in tl.static_range(lines):
            words += (block[line * count + column],)
    else:
        for pair in tl.static_range(lines // 2):
            upper, lower = block[2 * pair * count + column // 2], block[(2 * pair + 1) * count + column // 2]
            if column % 2:
                words += (((upper >> 16) & 0xFFFF) | (lower & -65536),)
            else:
                words += ((upper & 0xFFFF) | (lower << 16),)
    return words
