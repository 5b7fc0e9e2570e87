"""``nm::cslt_linear``: a linear whose weight is packed 2:4, on sparse tensor cores.

    y = x W^T + b        the library computes D = A B with A sparse, so A = W, B = x^T and D = y^T

The library can write D row by row, which is y^T and so y *in columns* (strides ``(1, tokens)``), or column by column,
which is y *in rows*. That is an argument, ``rows``, because neither is best everywhere. With the default algorithm on an
H200, bf16, from 1,024 tokens on, rows ran at 0.69 to 1.02 times the speed of the dense product, columns at 1.13 to 1.54 times,
and rows with the algorithm that the library's own search found at 1.31 to 1.63 times (``benchmarks/results/gpu.json``;
the numbers of the result in columns were not compared in that run).
Hence columns by default, and rows together with a searched algorithm.

Where the library's version is known, plans are kept and launched directly (`nm_compiler.runtime.cusparselt.direct`). Otherwise
torch's call makes the plan anew on the host every time, 0.4 to 1.0 ms on an H200: only a CUDA graph or large products hide it.
Nothing here waits for the device, so a graph can be captured; call the op once before, in the thread that captures, for the
library's handle. Inference only: there is no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.errors import NMError
from nm_compiler.runtime.cusparselt.algorithm import Algorithm
from nm_compiler.runtime.cusparselt.direct import binding
from nm_compiler.wording import shown

DTYPES = (torch.float16, torch.bfloat16)
TOKENS = 8  # the library takes multiples of it in 16 bits
ALIGNMENT = 16  # of every pointer, in bytes
ACTIVATIONS = ("", "relu")


@torch.library.custom_op("nm::cslt_linear", mutates_args=())
def cslt_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int, algorithm: int, rows: bool,
    activation: str = "",
) -> Tensor:  # fmt: skip
    """``x W^T + b`` with W packed by `nm_compiler.runtime.cusparselt.packing.pack`.

    x: ``[tokens, in]``, float16 or bfloat16, of any strides; bias: ``[out]`` or None, same dtype.
    out_features, in_features: of W, which the packed tensor does not tell: the library pads what it keeps beside the values.
    algorithm: 0 is the library's choice; others from `nm_compiler.runtime.cusparselt.search.search`.
    activation: of the result, "" for none or "relu"; the library's makes no promise about NaN.
    Returns ``[tokens, out]``: contiguous with ``rows``, else of strides ``(1, tokens)``, tokens rounded up to a multiple of 8.
    Raises NMError for operands that do not fit the packed weight.
    """
    _check(x, packed, bias, out_features, in_features, activation)
    return multiply(packed, x, bias, out_features, rows=rows, algorithm=algorithm, activation=activation)


@cslt_linear.register_fake
def _(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int, algorithm: int, rows: bool,
    activation: str = "",
) -> Tensor:  # fmt: skip
    _check(x, packed, bias, out_features, in_features, activation)
    return empty_result(x, out_features, rows)


def multiply(
    packed: Tensor, x: Tensor, bias: Tensor | None, out_features: int, *, rows: bool, algorithm: int = 0, activation: str = ""
) -> Tensor:
    """What ``nm::cslt_linear`` computes, as a plain function that checks nothing: for callers that made the operands fit.

    x: ``[tokens, in]``; the rest and the result as of the op.
    """
    tokens = x.shape[0]
    if tokens == 0:
        return empty_result(x, out_features, rows)
    bias = bias if bias is None else aligned(bias.contiguous())
    dense = operand(x)
    y = _directly(packed, dense, bias, out_features, rows, algorithm, activation)
    if y is None:
        y = _by_torch(packed, dense, bias, rows, algorithm)
        y = y.relu_() if activation else y
    if rows and y.shape[0] == tokens:
        return y
    # cut and turned where it is, not by a view: autograd lets nobody write into a view that an op returns
    return y.as_strided_((tokens, out_features), (out_features, 1) if rows else (1, y.shape[1]))


def _directly(
    packed: Tensor, dense: Tensor, bias: Tensor | None, out: int, rows: bool, algorithm: int, activation: str
) -> Tensor | None:
    direct = binding(dense.device)
    if direct is None:
        return None
    y = direct.product(packed, dense, bias, out, rows=rows, algorithm=algorithm, activation=activation)
    if y is None and algorithm:  # found for other sizes than these
        y = direct.product(packed, dense, bias, out, rows=rows, activation=activation)
    return y


def _by_torch(packed: Tensor, dense: Tensor, bias: Tensor | None, rows: bool, code: int) -> Tensor:
    algorithm = Algorithm.of(code)
    split: dict[str, Any] = {}
    if algorithm.split:
        split = {"split_k": algorithm.split, "split_k_mode": algorithm.mode or -1}
    y: Tensor = torch._cslt_sparse_mm(packed, dense, bias, transpose_result=rows, alg_id=algorithm.config, **split)
    return y


def operand(x: Tensor) -> Tensor:
    """``x^T`` as the library takes it: ``[in, tokens]``, tokens padded with zeros to a multiple of 8.

    torch asks only whether it is contiguous and takes it for a transposed one if not: other strides would be misread.
    """
    short = -x.shape[0] % TOKENS
    if short:
        x = functional.pad(x, (0, 0, 0, short))
    if not (x.is_contiguous() or x.t().is_contiguous()):
        x = x.contiguous()
    return aligned(x).t()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of it if it does not lie at a multiple of ``ALIGNMENT`` bytes, which the library needs."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def empty_result(x: Tensor, out_features: int, rows: bool, multiple: int = TOKENS) -> Tensor:
    """What a product of ``x`` returns, unwritten; in columns the tokens are rounded up to a multiple."""
    tokens = x.shape[0]
    if rows:
        return x.new_empty((tokens, out_features))
    padded = (tokens + multiple - 1) // multiple * multiple
    return torch.empty_strided((tokens, out_features), (1, padded), dtype=x.dtype, device=x.device)


def _check(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, inputs: int, activation: str) -> None:
    if x.ndim != 2:
        raise NMError(
            f"nm::cslt_linear takes [tokens, in]: {_given(x, packed)}. Flatten the tokens first: x.reshape(-1, x.shape[-1])"
        )
    if x.dtype not in DTYPES or packed.dtype != x.dtype or x.device != packed.device:
        raise NMError(
            f"nm::cslt_linear takes float16 or bfloat16 of one dtype on one device: {_given(x, packed)}. "
            "Cast x to the weight's"
        )
    if x.shape[1] != inputs:
        raise NMError(
            f"nm::cslt_linear: {_given(x, packed)}, which was packed from [{out}, {inputs}]; x needs {inputs} columns"
        )
    if packed.ndim != 2 or packed.shape[0] != out or packed.numel() * 16 < out * inputs * 9:
        raise NMError(
            f"nm::cslt_linear: {_given(x, packed)} does not hold [{out}, {inputs}]: pack that weight, and say its sizes"
        )
    if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != x.dtype or bias.device != x.device):
        raise NMError(
            f"nm::cslt_linear: a bias of {shown(bias)} for {_given(x, packed)}; it has to be [{out}] of {x.dtype} there too"
        )
    if activation not in ACTIVATIONS:
        raise NMError(
            f"nm::cslt_linear has no activation {activation!r}: leave it an op of its own, or say one of {ACTIVATIONS}"
        )


def _given(x: Tensor, packed: Tensor) -> str:
    return f"x of {shown(x)}, a packed weight of {shown(packed)}"
