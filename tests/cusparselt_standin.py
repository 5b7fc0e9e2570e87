# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""What torch does for cuSPARSELt, on a CPU: a packed weight really holds half of the values and where they were, nothing else.

It takes what the library takes and refuses what it refuses, and what torch would misread without a word. The real layout of
the packed bytes is another; their number is the same, as far as we saw it (0.8.0, 16 bits): all values, then the places in
whole tiles of 64 by 64, then what is missing to whole elements for every output channel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

DTYPES = (torch.float16, torch.bfloat16)


def compress(matrix: Tensor) -> Tensor:
    """``[out, in]`` -> ``[out, ..]``: kept values, then two bits each, padded. A third of four is dropped."""
    assert matrix.ndim == 2
    assert matrix.is_contiguous(), "torch does not look at strides"
    assert matrix.dtype in (*DTYPES, torch.int8), "Unsupported dtype for cuSPARSELt compressed matrix"
    assert not any(size % (32 // matrix.itemsize) for size in matrix.shape), "CUSPARSE_STATUS_INVALID_VALUE"
    groups = matrix.unflatten(1, (-1, 4))
    kept = (groups != 0).to(torch.uint8).argsort(stable=True, dim=-1, descending=True)[..., :2].sort(-1).values
    values = groups.gather(-1, kept).flatten(1)
    places = kept.flatten(1).unflatten(1, (-1, 4)).to(torch.uint8)
    bytes_ = sum(places[..., i] << 2 * i for i in range(4))
    (out, inputs), tile = matrix.shape, 64
    tiled = functional.pad(bytes_, (0, (-inputs % tile) // 8, 0, -out % tile), value=255)
    flat = torch.cat([values.flatten(), tiled.flatten().view(matrix.dtype)])
    return functional.pad(flat, (0, -flat.numel() % out)).view(out, -1)


def sparse_mm(
    packed: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    alpha: Any = None,
    out_dtype: Any = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    """``A B``, or ``B^T A^T`` in its place, in rows; every algorithm but 7 is right."""
    if packed.dtype == torch.int8:
        assert bias is None, "of a dtype that torch does not document"
        return _int8_mm(packed, dense, alpha, out_dtype, transpose_result)
    assert alpha is None
    assert out_dtype is None, "out_dtype support only available for int8/fp8 inputs"
    assert packed.dtype == dense.dtype
    assert dense.dtype in DTYPES
    assert dense.ndim == 2
    assert dense.is_contiguous() or dense.t().is_contiguous(), "torch would take it for a transposed contiguous one"
    assert dense.shape[0] % 16 == 0
    assert dense.shape[1] % 8 == 0, "CUSPARSE_STATUS_INVALID_VALUE"
    assert dense.shape[1] > 0, "CUSPARSE_STATUS_INVALID_VALUE"
    assert dense.data_ptr() % 16 == 0
    assert bias is None or (bias.shape == packed.shape[:1] and bias.is_contiguous() and bias.data_ptr() % 16 == 0)
    assert bias is None or bias.dtype == dense.dtype
    y = unpacked(packed, dense.shape[0]).float() @ dense.float()
    y = y if bias is None else y + bias.detach().float()[:, None]
    y = (y + (alg_id == 7)).to(dense.dtype)
    return y.t().contiguous() if transpose_result else y.contiguous()


def _int8_mm(packed: Tensor, dense: Tensor, alpha: Tensor, out_dtype: torch.dtype, transpose_result: bool) -> Tensor:
    assert dense.dtype == torch.int8
    assert not dense.is_contiguous(), "dense input must be transposed for 8bit dtypes"
    assert dense.t().is_contiguous()
    assert dense.shape[0] % 32 == 0
    assert dense.shape[1] % 16 == 0, "CUSPARSE_STATUS_INVALID_VALUE"
    assert alpha.shape == packed.shape[:1], "an alpha of one element is read on the host"
    assert alpha.dtype == torch.float32
    assert alpha.is_contiguous()
    assert out_dtype in DTYPES
    y = (unpacked(packed, dense.shape[0]).long() @ dense.long()).double() * alpha.double()[:, None]
    return (y.t() if transpose_result else y).to(out_dtype).contiguous()


def unpacked(packed: Tensor, inputs: int) -> Tensor:
    """The matrix that a packed one stands for."""
    (out, flat), tile = (packed.shape[0], packed.flatten()), 64
    kept = out * inputs // 2
    values, rows, wide = flat[:kept].view(out, -1), -(-out // tile) * tile, -(-inputs // tile) * tile // 8
    rest = flat[kept:].view(torch.uint8)[: rows * wide].view(rows, wide)[:out, : inputs // 8]
    places = torch.stack([(rest >> 2 * i) & 3 for i in range(4)], -1).flatten(1).unflatten(1, (-1, 2)).long()
    empty = torch.zeros(out, inputs // 4, 4, dtype=packed.dtype)
    return empty.scatter(-1, places, values.unflatten(1, (-1, 2))).flatten(1)


def install(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put the two in torch's place. Returns what the product was called with, call by call."""
    calls: list[dict[str, Any]] = []

    def recorded(packed: Tensor, dense: Tensor, bias: Tensor | None = None, **keywords: Any) -> Tensor:
        shown = {"shape": tuple(dense.shape), "contiguous": dense.is_contiguous(), "address": dense.data_ptr()}
        shown["dtype"] = dense.dtype
        calls.append({**shown, "bias": bias is not None, **keywords})
        return sparse_mm(packed, dense, bias, **keywords)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", recorded)
    return calls
