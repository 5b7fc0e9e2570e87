"""``nm::cslt_linear_int8``: a linear with an 8-bit packed weight and inputs that are rounded to 8 bits at every call.

    w  ~  s_o q_w      one scale for each output channel, found when the weight is packed; zeros stay zeros, so it stays 2:4
    x  ~  s   q_x      one scale for the whole input, its largest magnitude over 127, found at every call
    y  =  (s s_o) (q_w q_x) + b

Sums are whole numbers of 32 bits; the library multiplies them with ``alpha``, a float for each output channel, and writes
16 bits. torch reads an ``alpha`` of one element on the host, which would wait for the device, and hands a longer one on as it
is: scales by channel cost nothing and can be captured in a CUDA graph. Biases are added afterwards: which dtype the library
wants for them beside 8-bit operands, torch does not document. Inference only. Never executed on a GPU by us.

Why no float8: torch takes float8_e4m3fn too, with the same alpha. But its `_cslt_compress`, as we read its source, sets aside
9/16 of the dense bytes, right for 16-bit weights; two bits for each kept byte make 10/16, as it has for int8. Nothing here can
run it to find out whether that is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.errors import NMError
from nm_compiler.runtime.cusparselt.direct import binding
from nm_compiler.runtime.cusparselt.eligible import multiple_of
from nm_compiler.runtime.cusparselt.op import DTYPES, empty_result
from nm_compiler.runtime.cusparselt.unfold import matrix_of
from nm_compiler.solvers.check import worst_group

PACKED_SHARE = 10 / 16
"""Bytes of a packed weight for each weight."""
LARGEST = 127
TOKENS = 16  # the library takes multiples of it in 8 bits


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The packed whole numbers and the scales ``[out]``, float32, of a weight ``[out, in]`` with at most 2 of 4 non-zero.

    weight: float16 or bfloat16, on the GPU that runs it, both sizes multiples of 32. Raises NMError for others.
    """
    shown = f"a weight of {list(weight.shape)} ({weight.dtype}, {weight.device})"
    if weight.dtype not in DTYPES or weight.is_meta or weight.ndim != 2:
        raise NMError(f"{shown} cannot be packed in int8: needs [out, in], float16 or bfloat16, on the GPU that runs it")
    step = multiple_of(torch.int8)
    if any(size % step or not size for size in weight.shape):
        raise NMError(f"{shown} cannot be packed in int8: both sizes have to be multiples of {step}")
    matrix = matrix_of(weight).float()
    if worst_group(matrix, 4, 1) > 2:
        raise NMError(f"{shown} is not 2:4 along its inputs: freeze the model first, with pattern='2:4'")
    scale = matrix.abs().amax(1) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch._cslt_compress((matrix / scale.unsqueeze(1)).round().to(torch.int8)), scale


@torch.library.custom_op("nm::cslt_linear_int8", mutates_args=())
def cslt_linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, rows: bool) -> Tensor:
    """``x W^T + b`` in 8 bits, W and ``scale`` of `pack_int8`.

    x: ``[tokens, in]``, float16 or bfloat16, of any strides; bias: ``[out]`` or None, same dtype; in_features: of W. An input
    that is not finite spoils the whole result, as it sets the scale. Returns ``[tokens, out]`` of x's dtype: contiguous with
    ``rows``, else of strides ``(1, tokens)``, tokens rounded up to a multiple of 16. Raises NMError for operands that do not
    fit.
    """
    _check(x, packed, scale, in_features)
    tokens, out = x.shape[0], scale.shape[0]
    if tokens == 0:
        return empty_result(x, out, rows, TOKENS)
    step = (x.abs().amax().float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    whole = (x.float() / step).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    whole = functional.pad(whole, (0, 0, 0, -tokens % TOKENS)).contiguous()
    direct, alpha = binding(x.device), (scale * step).contiguous()
    y = None
    if direct is not None:
        y = direct.product(packed, whole.t(), None, out, rows=rows, alpha=alpha, result=x.dtype)
    if y is None:
        y = torch._cslt_sparse_mm(packed, whole.t(), alpha=alpha, out_dtype=x.dtype, transpose_result=rows)
    if bias is not None:
        y = y.add_(bias if rows else bias.unsqueeze(1))
    return y.as_strided_((tokens, out), (out, 1) if rows else (1, y.shape[1]))


@cslt_linear_int8.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, rows: bool) -> Tensor:
    _check(x, packed, scale, in_features)
    return empty_result(x, scale.shape[0], rows, TOKENS)


def _check(x: Tensor, packed: Tensor, scale: Tensor, inputs: int) -> None:
    out = scale.shape[0]
    if x.ndim != 2 or x.dtype not in DTYPES or packed.dtype != torch.int8 or x.shape[1] != inputs:
        raise NMError(
            f"nm::cslt_linear_int8 takes [tokens, {inputs}] of float16 or bfloat16 for this weight, not {list(x.shape)} "
            f"({x.dtype}): flatten the tokens first, cast to 16 bits"
        )
    if packed.ndim != 2 or packed.shape[0] != out or packed.numel() * 16 < out * inputs * 10:
        raise NMError(
            f"nm::cslt_linear_int8: {list(packed.shape)} does not hold a packed [{out}, {inputs}]: "
            "pack that weight with pack_int8, and say its inputs"
        )
