"""Pack a 2:4 weight for cuSPARSELt, once, when a graph is lowered.

The packed tensor holds the kept half of the values and two bits a value that say where each was: 9/16 of the dense bytes, and
more for small weights, as both sizes of what holds the bits were seen to be rounded up to multiples of 64 (0.8.0, 16 bits).
Its layout is the library's own and may change with its version: it is made on the machine that runs it, never written to disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.runtime.cusparselt.eligible import multiple_of
from nm_compiler.runtime.cusparselt.op import DTYPES
from nm_compiler.runtime.cusparselt.unfold import matrix_of
from nm_compiler.solvers.check import worst_group

PACKED_SHARE = 9 / 16
"""Bytes of a packed float16 or bfloat16 weight over those of the dense one, where both sizes are multiples of 64."""


def pack(weight: Tensor) -> Tensor:
    """Pack a weight ``[out, in]`` or ``[out, in, *taps]``, float16 or bfloat16, at most 2 of 4 along `in` non-zero.

    Returns a tensor of the library's layout, same dtype and device. Raises NMError for a weight that the library would
    refuse or, worse, cut: it drops what is more than 2 of 4 without a word.
    """
    shown = f"a weight of {list(weight.shape)} ({weight.dtype}, {weight.device})"
    if weight.dtype not in DTYPES or weight.is_meta:
        raise NMError(f"{shown} cannot be packed for cuSPARSELt: cast it to float16 or bfloat16, on the GPU that runs it")
    if weight.ndim not in (2, 4):
        raise NMError(f"{shown} cannot be packed for cuSPARSELt: only linears [out, in] and 2-D convolutions can")
    matrix = matrix_of(weight)  # the library reads rows and does not look at strides
    step = multiple_of(weight.dtype)
    if any(size % step or not size for size in matrix.shape):
        raise NMError(f"{shown} cannot be packed for cuSPARSELt: both sizes have to be multiples of {step}")
    if worst_group(matrix, 4, 1) > 2:
        raise NMError(f"{shown} is not 2:4 along its inputs: freeze the model first, with pattern='2:4'")
    return torch._cslt_compress(matrix)
