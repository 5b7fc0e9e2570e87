# mypy: disable-error-code="arg-type,no-any-return,no-untyped-call,operator,union-attr"
"""Models prepared for quantisation-aware training: fake quantisation keeps zeros, so masks go in front of it."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    disable_observer,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import nm_compiler as nm
from nm_compiler.solvers.magnitude import magnitude_mask

WEIGHTS = ["conv1.weight", "conv2.weight", "fc.weight"]


class Quantisable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(self.quant(x))))
        return self.dequant(self.fc(torch.relu(self.conv2(x)).mean((2, 3))))


def prepared(how: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and observers say how they will round
        if how == "fx":
            return prepare_qat_fx(Quantisable().train(), get_default_qat_qconfig_mapping("fbgemm"), (images(),))
        model = Quantisable().train()
        model.qconfig = get_default_qat_qconfig("fbgemm")
        return prepare_qat(model)


def images() -> Tensor:
    return torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.ci(here=["[eager"])
@pytest.mark.parametrize("how", ["eager", "fx"])
def test_masks_lie_in_front_of_fake_quantisation_and_int8_weights_are_2_4(how: str) -> None:
    """fx folds batch norm's factor into a weight before it is rounded."""
    model, x = prepared(how), images()
    reference = copy.deepcopy(model)
    masks = {name: magnitude_mask(reference.get_parameter(name).detach(), 2, 4, 1) for name in WEIGHTS}
    sparse = nm.compile(model, (x,), method=nm.Magnitude(), include=["*"])
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.05) for each in (sparse, reference))
    for _ in range(3):
        with torch.no_grad():
            for name, mask in masks.items():
                reference.get_parameter(name).mul_(mask)
        expected = reference(x).square().mean()
        expected.backward()
        for name, mask in masks.items():
            reference.get_parameter(name).grad.mul_(mask)
        theirs.step()
        theirs.zero_grad()
        loss = sparse(x).square().mean()
        loss.backward()
        ours.step()
        ours.zero_grad()
        torch.testing.assert_close(loss, expected)
    frozen = nm.freeze(sparse)
    for name, value in reference.named_buffers():
        torch.testing.assert_close(frozen.get_buffer(name), value)
    frozen.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        integers = convert_fx(frozen) if how == "fx" else convert(frozen)
    assert list(nm.verify(integers, "2:4").satisfied.values()) == [(1,)] * 3


@pytest.mark.ci(here=["BiMask"])
@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask(interval=1, moves=20), nm.SRSTE()], ids=lambda method: method.name)
def test_every_method_trains_behind_fake_quantisation(method: Any) -> None:
    model, x = prepared("eager"), images()
    sparse = nm.compile(model, (x,), method=method, include=["*"])
    optimizer, scheduler = torch.optim.SGD(sparse.parameters(), lr=0.05), nm.SparsityScheduler(sparse, total_steps=3)
    before = {name: sparse.get_parameter(name).detach().clone() for name in WEIGHTS}
    for _ in range(3):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert all(not torch.equal(sparse.get_parameter(name), before[name]) for name in WEIGHTS)
    sparse.eval()
    model.apply(disable_observer)  # they go on in evaluation mode
    expected = sparse(x)
    frozen = nm.freeze(sparse)
    torch.testing.assert_close(frozen.eval()(x), expected)
    assert set(nm.verify(frozen, "2:4").satisfied) == set(WEIGHTS)


@pytest.mark.parametrize("how", ["eager", pytest.param("fx", marks=pytest.mark.ci)])
def test_a_live_model_of_layers_that_torchdynamo_never_follows_is_an_error_in_its_first_call(how: str) -> None:
    model = nm.compile(prepared(how), method=nm.SRSTE(), then="eager")
    for _ in range(2):
        with pytest.raises(
            nm.NMError, match="(?s)conv2.weight is read by code that TorchDynamo .* give nm.compile example inputs"
        ):
            model(images())
