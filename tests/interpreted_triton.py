# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Run the Triton kernels on a CPU, in Triton's interpreter, and print as JSON what agrees with the reference, case by case.

A process of its own: what `triton.jit` makes of a function is settled when triton is imported, by TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain

import torch
from plain_packing import pack_plainly
from torch import Tensor
from triton_steps import cases, counts

from nm_compiler.pattern import Pattern
from nm_compiler.solvers.magnitude import magnitude_mask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TWO = ("2:4", "1:4", "1:2", "2:8", "1:16")
SHAPES = ((16, 16), (80, 48), (144, 272))


def weights(out: int, inputs: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of normal numbers; of few that are often equal, zeros of both signs among them; with what is no number."""
    ties = torch.randint(-2, 3, (out, inputs)).to(dtype)
    strange = torch.randn(out, inputs).to(dtype)
    strange[torch.rand(out, inputs) < 0.1] = float("nan")
    strange[torch.rand(out, inputs) < 0.1] = float("-inf")
    return {"normal": torch.randn(out, inputs).to(dtype), "ties": torch.where(ties == 0, -ties, ties), "strange": strange}


def reference(weight: Tensor, order: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    zero = weight.new_zeros(())
    forward = torch.where(magnitude_mask(weight, n, m, 1), weight, zero)
    ordered = forward if order is None else forward[order]
    return forward, torch.where(magnitude_mask(ordered, n, m, 0), ordered, zero).t().contiguous()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _shapes(text: str, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """The largest takes seconds where threads have blocks of their own, and the middle one has several programs there."""
    if dtype != torch.bfloat16 or text == "2:8":
        return SHAPES[1:2]
    return SHAPES if text == "1:16" else SHAPES[:2]


def two_masks() -> Iterator[tuple[str, bool]]:
    from nm_compiler.solvers import two_masks_triton

    for text in TWO:
        pattern = Pattern.parse(text)
        for dtype in DTYPES if text == "2:4" else (torch.bfloat16,):
            for out, inputs in _shapes(text, dtype):
                for name, weight in weights(out, inputs, dtype).items():
                    for order in (None, torch.randperm(out)):
                        given = weight.t().contiguous().t() if order is None else weight
                        found = two_masks_triton.two_masks(given, order, pattern.n, pattern.m)
                        wanted = reference(weight, order, pattern.n, pattern.m)
                        same = all(torch.equal(bits(a), bits(b)) for a, b in zip(found, wanted, strict=True))
                        lies = all(each.is_contiguous() for each in found)
                        place = "as it lies" if order is None else "in an order"
                        yield f"two masks {text} {dtype} {out}x{inputs} {name} {place}", same and lies


def one_mask() -> Iterator[tuple[str, bool]]:
    from nm_compiler.solvers import masks_triton

    for text in ("2:4", "3:4", "1:4", "1:2", "4:8", "1:8", "1:16", "5:16", "2:3"):
        pattern = Pattern.parse(text)
        for dtype in (torch.bfloat16, torch.float32) if text in ("2:4", "1:8") else (torch.bfloat16,):
            for name, weight in weights(4 * pattern.m, 10 * pattern.m, dtype).items():
                for axis in (0, 1):
                    wanted = magnitude_mask(weight, pattern.n, pattern.m, axis)
                    same = torch.equal(masks_triton.mask(weight, pattern.n, pattern.m, axis).bool(), wanted)
                    kept = masks_triton.masked(weight, pattern.n, pattern.m, axis)
                    same = same and torch.equal(bits(kept), bits(torch.where(wanted, weight, weight.new_zeros(()))))
                    yield f"one mask {text} {dtype} axis {axis} {name}", same


def packed() -> Iterator[tuple[str, bool]]:
    """Operands for cuSPARSELt, masked along their inputs, and masked both ways and turned."""
    from nm_compiler.runtime.cusparselt import pack_triton

    for text, dtype, name, out, inputs in (
        ("2:4", torch.bfloat16, "strange", 128, 192), ("2:8", torch.bfloat16, "strange", 64, 64),
        ("1:2", torch.float16, "normal", 64, 128), ("2:4", torch.float16, "normal", 64, 64),
    ):  # fmt: skip
        pattern = Pattern.parse(text)
        for order in (torch.randperm(out), None):
            masked, turned = reference(weights(out, inputs, dtype)[name], order, pattern.n, pattern.m)
            same = [torch.equal(bits(pack_triton.packed(each)), bits(pack_plainly(each))) for each in (masked, turned)]
            yield f"packed {text} {dtype} {name} {'as it lies' if order is None else 'in an order'}", all(same)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(dict(chain(two_masks(), one_mask(), packed(), cases(), counts()))))
