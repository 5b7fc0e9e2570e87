"""What a packed product's shapes decide, worked out once for each: sizes of the result and of the operands, and C's fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.runtime.native.job import ACTIVATIONS, DTYPES, Fields
from nm_compiler.runtime.native.packing import LANES, sizes

FEW = 24
"""Tokens up to which the weights' way through memory is what takes time."""
FEWEST = 2
"""Tokens of bfloat16 up to which the float32 kernel is faster for patterns that few_dots.h does not have."""
_Sizes = tuple[int, ...]


class Shapes(NamedTuple):
    """Of one product. weight: as it was before it was packed; result, strides: of y; fields: as C reads them."""

    weight: _Sizes
    pattern: Pattern
    conv_groups: int
    values: _Sizes
    codes: _Sizes
    scales: _Sizes
    result: _Sizes
    strides: _Sizes
    numel: int
    halves: bool
    fields: bytes


@lru_cache(maxsize=4096)
def of_linear(x: _Sizes, rows: int, pattern: _Sizes, dtype: torch.dtype, activation: str, halves: bool = False) -> Shapes:
    """``x [..., in]`` times a weight of ``rows`` outputs. dtype: of its packed values; a name that is none may be given.

    halves: all that comes in and goes out is bfloat16, and the processor computes with it.
    """
    width = x[-1] if x else 0
    result = (*x[:-1], rows)
    tokens = math.prod(x[:-1])
    halves = halves and _even(pattern, width) and (tokens > FEWEST or (pattern[0] <= 2 and pattern[1] in (4, 8, 16)))
    fields = Fields(
        DTYPES.get(dtype, -1), *_two(pattern), 1, rows, width, 1, 1, tokens, 1, tokens, 1, 1, 1, 1, 0, 0, 1, 1, width, rows, 1,
        ACTIVATIONS.get(activation, -1), int(tokens <= FEW), int(halves),
    )  # fmt: skip
    return _shapes((rows, width), pattern, 1, result, _contiguous(result), fields)


@lru_cache(maxsize=4096)
def of_conv2d(
    x: _Sizes, last: bool, rows: int, pattern: _Sizes, dtype: torch.dtype, kernel: _Sizes, stride: _Sizes, padding: _Sizes,
    dilation: _Sizes, groups: int, activation: str, halves: bool = False,
) -> Shapes:  # fmt: skip
    """``x [batch, in, height, width]``, its channels innermost if ``last``. Raises NMError for what is no convolution."""
    if len(x) != 4 or groups < 1 or x[1] % groups or rows % groups:
        raise NMError(
            f"nm::packed_conv2d takes x [batch, in, height, width], its channels and {rows} rows in {groups} groups; "
            f"not {list(x)}"
        )
    out_h, out_w = _checked_sizes(x, kernel, stride, padding, dilation)
    batch, channels, height, width = x
    images = (batch, height, width, out_h, out_w)
    if max(*kernel, *stride) == 1 and not any(padding):  # a linear: pixels are tokens
        pixels = height * width * (batch if last else 1)
        images = (1 if last else batch, 1, pixels, 1, pixels)
    halves = halves and last and _even(pattern, channels // groups * math.prod(kernel))
    fields = Fields(
        DTYPES.get(dtype, -1), *_two(pattern), groups, rows // groups, channels // groups, *images, *_two(kernel),
        *_two(stride), *_two(padding), *_two(dilation), channels, rows, int(last), ACTIVATIONS.get(activation, -1), 0,
        int(halves),
    )  # fmt: skip
    result = (batch, rows, out_h, out_w)
    strides = (rows * out_h * out_w, 1, out_w * rows, rows) if last else _contiguous(result)
    return _shapes((rows, channels // groups, *kernel), pattern, groups, result, strides, fields)


def out_sizes(
    x: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of a convolution's result; also of symbolic sizes."""
    found = [(x[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return found[0], found[1]


def _shapes(weight: _Sizes, pattern: _Sizes, groups: int, result: _Sizes, strides: _Sizes, fields: Fields) -> Shapes:
    known = Pattern(*_two(pattern))
    tiles, steps, words = sizes(weight, known, groups)
    values, codes, scales = (groups, tiles, steps, LANES), (groups, tiles, words, LANES), (groups, tiles, LANES)
    return Shapes(
        weight, known, groups, values, codes, scales, result, strides, math.prod(result), bool(fields.halves), fields.packed()
    )


def _even(pattern: _Sizes, k: int) -> bool:
    """Whether kept positions come in twos in every window of 32 along k, also in the last one (dots.h)."""
    n, m = _two(pattern)
    return m > 0 and 32 % m == 0 and (32 // m * n) % 2 == 0 and (k // m * n) % 2 == 0


def _two(numbers: _Sizes) -> tuple[int, int]:
    if len(numbers) != 2:
        raise NMError(f"a packed weight has a pattern [n, m], not {list(numbers)}")
    return numbers[0], numbers[1]


def _contiguous(shape: _Sizes) -> _Sizes:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def _checked_sizes(x: _Sizes, kernel: _Sizes, stride: _Sizes, padding: _Sizes, dilation: _Sizes) -> tuple[int, int]:
    """Height and width of the result."""
    given = f"nm::packed_conv2d: kernel {[*kernel]}, stride {[*stride]}, padding {[*padding]}, dilation {[*dilation]}"
    for numbers, least in ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1)):
        if len(numbers) != 2 or min(numbers) < least:
            raise NMError(f"{given}: two numbers each, padding from 0 on, the others from 1 on")
    found = out_sizes(x, kernel, stride, padding, dilation)
    if min(found) < 1:
        raise NMError(f"{given}: the images of x {list(x)} are too small")
    return found
