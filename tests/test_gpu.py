"""What has to hold on an NVIDIA GPU as on the CPU. `make gpu` runs these on a machine that has one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.masks import masked, top_mask
from nm_compiler.solvers.transposable import transposable_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: make gpu"),
]

METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(), nm.SRSTE(), nm.Magnitude()]
NAMES = ["LBC", "LBC-combination", "BiMask", "SRSTE", "Magnitude"]
STEPS = 12


def of(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 model with a batch."""
    torch.manual_seed(0)
    if kind == "conv":
        return ConvNet(16).double(), torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(4, (6,))
    if kind == "attention":
        return Attention().double(), torch.randint(12, (5, 6)), torch.randint(12, (30,))
    return MLP(32).double(), torch.randn(9, 8, dtype=torch.float64), torch.randint(4, (9,))


def trained(model: nn.Module, x: Tensor, y: Tensor, method: Any, device: str, steps: int = STEPS) -> tuple[Any, list[float]]:
    """The sparse model after some steps on a device, and the losses."""
    model, x, y = copy.deepcopy(model).to(device), x.to(device), y.to(device)
    sparse = nm.compile(model, (x,), method=method)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    scheduler, losses = nm.SparsityScheduler(sparse, total_steps=steps), []
    for _ in range(steps):
        loss = functional.cross_entropy(sparse(x).flatten(0, -2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss))
    return sparse, losses


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_every_method_trains_as_it_does_on_the_cpu_and_freezes_to_the_same_zeros(method: Any, kind: str) -> None:
    model, x, y = of(kind)
    here, expected = trained(model, x, y, method, "cpu")
    there, found = trained(model, x, y, method, "cuda")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    wanted, frozen = nm.freeze(here, finish=True), nm.freeze(there, finish=True)
    assert nm.verify(frozen, "2:4").satisfied
    for name, weight in wanted.state_dict().items():
        torch.testing.assert_close(frozen.state_dict()[name].cpu(), weight, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "2:8", "1:16", "8:16", "5:32", "2:3"])
def test_masks_are_those_of_the_cpu_ties_included(text: str, dtype: torch.dtype) -> None:
    nm_, generator = Pattern.parse(text), torch.Generator().manual_seed(3)
    weight = torch.randint(-6, 7, (3, 2 * nm_.m * 5, nm_.m * 4), generator=generator).to(dtype)
    weight[0, 0, :3] = torch.tensor([-0.0, 0.0, -0.0], dtype=dtype)
    for axis in (-1, 1):
        expected = magnitude_mask(weight, nm_.n, nm_.m, axis)
        for given in (weight.cuda(), weight.cuda().transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(top_mask(given, pattern=text, axis=axis).cpu(), expected)
            assert torch.equal(masked(given, pattern=text, axis=axis).cpu(), masked(weight, pattern=text, axis=axis))
            bits = top_mask(given, pattern=text, axis=axis, form="bits")
            assert bits.is_cuda
            assert torch.equal(bits.cpu(), top_mask(weight, pattern=text, axis=axis, form="bits"))


def test_nan_weights_get_the_mask_they_get_on_the_cpu() -> None:
    weight = torch.randn(8, 64)
    weight[2, 5] = weight[3, 0] = float("nan")
    weight[3, 1] = float("inf")
    assert torch.equal(top_mask(weight.cuda(), pattern="2:4").cpu(), top_mask(weight, pattern="2:4"))


def test_a_transposable_mask_stays_on_its_device() -> None:
    importance = torch.rand(16, 16)
    found = transposable_mask(importance.cuda(), pattern="2:4")
    assert found.is_cuda
    assert torch.equal(found.cpu(), transposable_mask(importance, pattern="2:4"))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_bf16_autocast_trains_and_stays_n_of_m(method: Any) -> None:
    torch.manual_seed(0)
    model, x, y = ConvNet(16).cuda(), torch.randn(32, 3, 8, 8, device="cuda"), torch.randint(4, (32,), device="cuda")
    sparse = nm.compile(model, (x,), method=method)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    scheduler, losses = nm.SparsityScheduler(sparse, total_steps=30), []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = functional.cross_entropy(sparse(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert nm.verify(nm.freeze(sparse, finish=True), "2:4").satisfied


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_torch_compile_computes_what_eager_does_on_the_gpu(method: Any) -> None:
    torch.manual_seed(0)
    model, x, y = MLP(32).cuda(), torch.randn(16, 8, device="cuda"), torch.randint(4, (16,), device="cuda")
    sparse = nm.compile(model, (x,), method=method)
    results = []
    for run in (sparse, torch.compile(sparse, fullgraph=True)):
        sparse.zero_grad()
        loss = functional.cross_entropy(run(x), y)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in sparse.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_a_model_on_the_gpu_is_permuted_there_and_computes_the_same() -> None:
    model, x, _ = of("conv")
    model, x = model.cuda().eval(), x.cuda()
    before = model(x)
    permutation = nm.permute(model, (x,), budget_s=0.3)
    assert len(permutation)
    assert all(parameter.is_cuda for parameter in model.parameters())
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu() -> None:
    model, x, y = of("mlp")
    there, _ = trained(model, x, y, nm.LBC(), "cuda", steps=6)
    here = nm.compile(copy.deepcopy(model), (x,), method=nm.LBC())
    here.load_state_dict({name: value.cpu() for name, value in there.state_dict().items()})
    torch.testing.assert_close(here(x), there(x.cuda()).cpu(), rtol=1e-10, atol=1e-10)
