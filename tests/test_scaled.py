# mypy: disable-error-code="no-untyped-call,operator"
"""Weights that are computed when they are read: the same bits each time, no memory of their own until they are kept."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from models import ConvNet
from packed_products import unpack
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.runtime.native.packing import pack
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
    given = scaled()
    given.weight.view(24, 4, 4, 3, 3)[:, :, 2:] = 0
    it = Scaled(given.weight, given.factor, given.dtype)
    packed, wanted = pack(it, nm.Pattern(2, 4)), pack(it.value(), nm.Pattern(2, 4))
    assert torch.equal(packed.values, wanted.values)
    assert torch.equal(packed.codes, wanted.codes)
    assert torch.equal(unpack(packed), it.value())


@pytest.mark.ci(here=["None-dense"])
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


@pytest.fixture(scope="module")
def lowered() -> Any:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return nm.lower(nm.freeze(nm.compile(ConvNet(), (x,), method=nm.Magnitude())), (x,), backend="dense")


def waiting(lowered: nn.Module) -> list[str]:
    each = lowered._modules["run"]
    assert each is not None
    return [name for name, buffer in each._buffers.items() if isinstance(buffer, Scaled)]


def as_for_a_file(lowered: Any) -> Any:
    """As it comes back with a file: folded weights wait."""
    for name, buffer in lowered.run._buffers.items():
        if buffer.ndim == 4:
            lowered.run._buffers[name] = Scaled(buffer, torch.ones(len(buffer), dtype=torch.float64), buffer.dtype)
    lowered.__dict__["settled"] = False
    return lowered


@pytest.mark.parametrize(
    "ask",
    [
        lambda lowered: lowered(torch.zeros(4, 3, 8, 8)),
        lambda lowered: list(lowered.buffers()),
        lambda lowered: lowered.state_dict(),
        lambda lowered: nn.Sequential(lowered).state_dict(),
        lambda lowered: nn.Sequential(lowered).float(),
        lambda lowered: copy.deepcopy(nn.Sequential(lowered)),
        lambda lowered: torch.save(lowered, io.BytesIO()),
    ],
    ids=["a call", "buffers", "state_dict", "state_dict of more", "to", "deepcopy", "save"],
)
def test_folded_weights_that_wait_are_computed_for_whoever_asks(ask: Any, lowered: Any) -> None:
    before = {name: value.clone() for name, value in lowered.state_dict().items()}
    assert waiting(as_for_a_file(lowered))
    ask(lowered)
    assert not waiting(lowered)
    assert all(torch.equal(value, before[name]) for name, value in lowered.state_dict().items())


def test_a_copy_of_what_waits_computes_the_same(lowered: Any) -> None:
    twin, x = copy.deepcopy(as_for_a_file(lowered)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(twin(x), lowered(x))


@pytest.mark.ci
def test_for_a_file_they_wait_and_a_model_that_trained_on_is_not_mixed_with_what_it_was(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = nm.freeze(nm.compile(ConvNet(), (x,), method=nm.Magnitude())).eval()
    lowered = nm.lower(model, (x,), backend="onnx", options={"path": tmp_path / "net.onnx"})
    assert waiting(lowered)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        with pytest.raises(nm.NMError, match=r"shape \[.*\] was written to after nm\.lower.*Lower the model again"):
            lowered(x)


def test_a_model_may_train_on_once_they_are_computed(lowered: Any) -> None:
    first = next(name for name, buffer in as_for_a_file(lowered).run._buffers.items() if isinstance(buffer, Scaled))
    source = lowered.run._buffers[first].weight
    before = lowered.settle().state_dict()[f"run.{first}"].clone()
    source.mul_(2)
    assert torch.equal(lowered.state_dict()[f"run.{first}"], before)
