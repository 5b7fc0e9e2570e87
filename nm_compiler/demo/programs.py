"""The before/after graph of one residual block, as programs: one line a node, marked where a method brought it in."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

import nm_compiler as nm
from nm_compiler.capture.export import capture
from nm_compiler.demo.models import Block
from nm_compiler.demo.settings import METHODS, TITLES
from nm_compiler.graph import show_graph
from nm_compiler.pattern import Pattern

_WIDTH = 16
_STATISTICS = re.compile(r"^%bn\d_(weight|bias|running_\w+) ")


@dataclass(frozen=True, slots=True)
class Program:
    """A graph in evaluation mode as lines, each with a mark: "" as in the dense program, "new" for the library's own
    operations and state, "changed" where an argument is another one."""

    title: str
    lines: tuple[tuple[str, str], ...]


def programs(pattern: Pattern, methods: tuple[str, ...] = ("lbc", "bimask")) -> list[Program]:
    """One block of 16 channels: dense, then under each method. The loads of batch-norm's own tensors are left out."""
    example = torch.zeros(2, _WIDTH, 8, 8)
    captured, _ = capture(Block(_WIDTH, _WIDTH), (example,), {}, None)[False]
    before = _lines(show_graph(captured))
    found = [Program("dense", tuple((line, "") for line in before))]
    for method in methods:
        sparse = nm.compile(Block(_WIDTH, _WIDTH), (example,), pattern=pattern, method=METHODS[method](), include="*")
        lines = tuple((line, _mark(line, before)) for line in _lines(nm.show(sparse)))
        found.append(Program(f"{TITLES[method]} {pattern}", lines))
    return found


def _lines(program: str) -> list[str]:
    return [line for line in program.splitlines() if not _STATISTICS.match(line)]


def _mark(line: str, before: list[str]) -> str:
    if line in before:
        return ""
    return "new" if " = nm." in line or " = self." in line else "changed"
