# mypy: disable-error-code="no-untyped-call,operator"
"""Weights that are computed when they are read: the same bits each time, no memory of their own until they are kept."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from models import ConvNet
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.runtime.native.packing import pack, unpack
from nm_compiler.scaled import Scaled, keep, stood_in, value_if_scaled


def scaled(dtype: torch.dtype = torch.float32, *, form: torch.memory_format = torch.contiguous_format) -> Scaled:
    torch.manual_seed(0)
    weight = torch.randn(24, 16, 3, 3).contiguous(memory_format=form)
    return Scaled(weight, torch.rand(24, dtype=torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_product_in_float64_rounded_once_in_the_layout_of_the_weight(
    dtype: torch.dtype, form: torch.memory_format
) -> None:
    it = scaled(dtype, form=form)
    wanted = (it.weight.double() * it.factor.view(-1, 1, 1, 1)).to(dtype)
    assert torch.equal(it.value(), wanted)
    assert it.value().stride() == it.stride() == it.weight.stride()
    assert (it.shape, it.dtype, it.device) == (wanted.shape, dtype, wanted.device)


def test_ops_get_the_product_and_return_plain_tensors() -> None:
    it, x = scaled(), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        found = torch.conv2d(x, it)
        assert torch.equal(found, torch.conv2d(x, it.value()))
        assert type(found) is type(it.flatten(1)) is type(it.to(torch.float16)) is Tensor
        assert type(it.detach()) is Scaled
    assert value_if_scaled(x) is x


def test_kept_buffers_are_plain_and_stand_ins_are_gone_after_the_block() -> None:
    it, module = scaled(), nn.Module()
    module.register_buffer("w", it)
    with contextlib.suppress(ZeroDivisionError), stood_in(module, read=True):
        assert module.w is it.weight
        raise ZeroDivisionError
    assert module.w is it
    half = scaled(torch.float16)
    assert torch.equal(half.stand_in(read=True), half.value())
    assert half.stand_in(read=False).shape == half.shape
    keep(module)
    assert type(module.w) is Tensor
    assert torch.equal(module.w, it.value())


def test_a_weight_is_packed_from_it_as_from_its_value() -> None:
    it = scaled()
    it.weight.view(24, 4, 4, 3, 3)[:, :, 2:] = 0
    packed, wanted = pack(it, nm.Pattern(2, 4)), pack(it.value(), nm.Pattern(2, 4))
    assert torch.equal(packed.values, wanted.values)
    assert torch.equal(packed.codes, wanted.codes)
    assert torch.equal(unpack(packed), it.value())


@pytest.mark.parametrize("backend", ["dense", "onnx"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_what_lower_returns_holds_none(backend: str, dtype: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = nm.freeze(nm.compile(ConvNet(), (x,), method=nm.Magnitude())).eval()
    options = {"path": tmp_path / "net.onnx"} if backend == "onnx" else {}
    for check in (True, False):
        lowered = nm.lower(model, (x,), backend=backend, dtype=dtype, check=check, options=options)
        folded = [name for name, _ in lowered.named_buffers() if name.endswith("_folded")]
        assert folded
        assert not any(isinstance(value, Scaled) for value in lowered.state_dict().values())
