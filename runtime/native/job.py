"""What the kernels are told: the fields of ``nm_job`` in job.h, in the same order, 64 bits each."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Of packed values."""
ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "relu6": 5, "hardswish": 6}


class Fields(NamedTuple):
    """What shapes decide; job.h says what each is. rows, inputs: of one conv group; ldx, ldy: channels of all of them."""

    dtype: int
    n: int
    m: int
    groups: int
    rows: int
    inputs: int
    batch: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    ldx: int
    ldy: int
    channels_last: int
    activation: int
    few: int
    halves: int

    def packed(self) -> bytes:
        """As C reads them."""
        return _FIELDS.pack(*self)


class Job(NamedTuple):
    """Addresses, 0 for what is not there, and fields as C reads them."""

    x: int
    y: int
    residual: int
    bias: int
    values: int
    codes: int
    scales: int
    fields: bytes


_ADDRESSES, _FIELDS, _WORKERS = (struct.Struct(f"={count}q") for count in (len(Job._fields) - 1, len(Fields._fields), 3))
BYTES = _ADDRESSES.size + _FIELDS.size + _WORKERS.size


def packed(job: Job, threads: int, scratch: tuple[int, int]) -> bytes:
    """The job as C reads it. scratch: address and bytes."""
    return _ADDRESSES.pack(*job[:-1]) + job.fields + _WORKERS.pack(threads, *scratch)


def address(tensor: Tensor | None) -> int:
    """Where the values of a tensor lie; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
