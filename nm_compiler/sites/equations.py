"""Every product of two tensors as an einsum: which axes it sums over, and which it keeps.

aten.linear(x, w, b)     bsi,oi->bso  + b          aten.bmm(x, w)           bti,bio->bto
aten.matmul(x, w)        btsi,io->btso             aten.einsum("bei,eoi->beo", [x, w])
aten.mm(w, x)            oi,ib->ob                 aten.tensordot(x, w, [1], [1])
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from nm_compiler.graph import arguments_of

aten = torch.ops.aten

LINEAR = aten.linear.default
MATMULS = (aten.mm.default, aten.matmul.default, aten.bmm.default, aten.mv.default)
ADDED = (aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
EINSUM = aten.einsum.default
_OTHERS = (aten.inner.default, aten.tensordot.default)
PRODUCTS = (LINEAR, *MATMULS, *ADDED, EINSUM, *_OTHERS)


@dataclass(frozen=True, slots=True)
class Equation:
    """A product of two tensors: ``operands``, one letter for each of their axes in ``terms``, and those of the result.

    added: what is added to the product (a bias, or the first operand of addmm), or None.
    """

    operands: tuple[Node, Node]
    terms: tuple[str, str]
    out: str
    added: Node | None = None


def equation_of(node: Node) -> Equation | str:
    """Write one of `PRODUCTS` as an einsum, or say why it is none."""
    target: Any = node.target
    args: tuple[Any, ...] = node.args
    if target is EINSUM:
        return _einsum(*args[:2])
    letters = iter(string.ascii_letters)
    if target in ADDED:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return f"{target._opname} with alpha or beta other than 1: scale the result in its place"
        added, left, right = args[:3]
        return _matmul(left, right, letters, added)
    left, right = args[:2]
    if target in MATMULS:
        return _matmul(left, right, letters, None)
    if not isinstance(left, Node) or not isinstance(right, Node):
        return "its operands are no tensors"
    first, second = _take(letters, _ndim(left)), _take(letters, _ndim(right))
    if target is aten.tensordot.default:
        ours, theirs = ([a % len(term) for a in dims] for dims, term in zip(args[2:4], (first, second), strict=True))
    else:  # linear and inner sum over the last axes of both
        ours, theirs = [len(first) - 1], [len(second) - 1]
    summed = {second[b]: first[a] for a, b in zip(ours, theirs, strict=True)}
    term = "".join(summed.get(letter, letter) for letter in second)
    out = "".join(letter for letter in first + second if letter not in summed and letter not in summed.values())
    bias: Any = arguments_of(node)["bias"] if target is LINEAR else None
    return Equation((left, right), (first, term), out, bias)


def _matmul(left: Any, right: Any, letters: Iterator[str], added: Any) -> Equation | str:
    """``[*batch, t, i] @ [*batch, i, o]``; either may be a vector, and batch axes are aligned from the right."""
    if not isinstance(left, Node) or not isinstance(right, Node):
        return "its operands are no tensors"
    batch = _take(letters, max(_ndim(left), _ndim(right), 2) - 2)
    row, inner, column = (next(letters) for _ in range(3))
    first = inner if _ndim(left) == 1 else batch[len(batch) - _ndim(left) + 2 :] + row + inner
    second = inner if _ndim(right) == 1 else batch[len(batch) - _ndim(right) + 2 :] + inner + column
    out = batch + row * (_ndim(left) > 1) + column * (_ndim(right) > 1)
    return Equation((left, right), (first, second), out, added)


def _einsum(text: str, tensors: list[Node]) -> Equation | str:
    if len(tensors) != 2:
        return f"an einsum of {len(tensors)} tensors: write it as products of two"
    left, right = tensors
    inputs, arrow, out = text.replace(" ", "").partition("->")
    terms = inputs.split(",")
    named = sorted({letter for letter in inputs if letter.isalpha()})
    if not arrow:  # implicit: the ellipsis, then what appears once, in alphabetical order
        out = "..." * ("..." in inputs) + "".join(letter for letter in named if inputs.count(letter) == 1)
    spare = "".join(letter for letter in string.ascii_letters if letter not in named)
    hidden = [_ndim(tensor) - len(term.replace("...", "")) for tensor, term in zip((left, right), terms, strict=True)]
    most = max((k for k, term in zip(hidden, terms, strict=True) if "..." in term), default=0)
    first, second = (term.replace("...", spare[most - k : most]) for k, term in zip(hidden, terms, strict=True))
    if any(len(set(term)) < len(term) for term in (first, second)):
        return "an einsum that reads a diagonal: make the diagonal the parameter"
    return Equation((left, right), (first, second), out.replace("...", spare[:most]))


def _take(letters: Iterator[str], count: int) -> str:
    return "".join(next(letters) for _ in range(count))


def _ndim(node: Node) -> int:
    return int(node.meta["val"].ndim)
