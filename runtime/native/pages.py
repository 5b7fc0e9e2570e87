"""Packed weights side by side in huge pages: they are read once a call, and so is the table of their pages.

    before    every packed tensor in pages of 4 KiB, wherever the allocator put it
    after     one mapping in the order of the graph, in pages of 2 MiB where the system grants them

Values and graph stay as they are. Without huge pages (another system, or switched off) nothing is moved.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.memory import give_back
from nm_compiler.runtime.native.ops import CONV2D, LINEAR

PAGE = 2 * 2**20
_LINE = 64
_AT_ONCE = 4 * 2**20  # bytes that are there twice
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages(gm: GraphModule) -> GraphModule:
    """Move what packed products read, one tensor after another, so that there is never a second copy of all.

    Parts of the model that were lowered before have theirs in pages of their own.
    """
    values: dict[str, Tensor] = gm.__dict__["extras"]
    names = [name for name in dict.fromkeys(packed_names(gm)) if name in values and values[name].numel()]
    size = sum({id(values[name]): _room(values[name]) for name in names}.values())
    if size < PAGE or not granted():
        return gm
    memory, place = mapping(size)
    moved: dict[int, Tensor] = {}
    freed = 0
    for name in names:
        old = values[name]
        if id(old) not in moved:
            moved[id(old)], place = tensor_in(memory, place, old).copy_(old), place + _room(old)
        gm.__dict__[name] = values[name] = moved[id(old)]
        freed += old.nbytes
        if freed > _AT_ONCE:
            freed = 0
            del old
            give_back()
    return gm


def granted() -> bool:
    """Whether this system gives huge pages to those who ask."""
    try:
        return sys.platform == "linux" and "[never]" not in _SWITCH.read_text()
    except OSError:
        return False


def mapping(size: int) -> tuple[mmap.mmap, int]:
    """Fresh memory, and where in it ``size`` bytes from the start of a huge page on lie."""
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE


def tensor_in(memory: mmap.mmap, place: int, like: Tensor) -> Tensor:
    """A tensor ``like`` another one, of a storage of its own, as files want it; it keeps the memory alive."""
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=place).view(like.shape)


def packed_names(gm: GraphModule) -> Iterator[str]:
    """Names of values, codes and scales of packed products in the order in which they are read; shared ones again."""
    for node in gm.graph.nodes:
        if node.target in (LINEAR, CONV2D):
            yield from (str(operand.target) for operand in node.args[1:4] if isinstance(operand, Node))


def _room(value: Tensor) -> int:
    return -(-value.nbytes // _LINE) * _LINE
