# mypy: disable-error-code="no-untyped-call"
"""What is no plain tensor on a GPU is left to other kernels and to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nm_compiler.pattern import Pattern
from nm_compiler.solvers import gpu, masks
from nm_compiler.solvers.combinations import byte_table, pack


class Odd(Tensor):
    pass


@pytest.mark.parametrize("kind", ["cpu", "meta", "fake", "subclass"])
def test_only_plain_tensors_on_a_gpu_get_triton_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, live, table = torch.randn(8, 16), pack(torch.ones(8, 4, 6)), byte_table(Pattern(2, 4))
    mask, order = weight > 0, torch.arange(8)
    tensors = [weight, live, table, mask, order]
    if kind == "meta":
        tensors = [each.to("meta") for each in tensors]
    elif kind != "cpu":
        monkeypatch.setattr(masks, "on_gpu", lambda _: True)
    if kind == "fake":
        with FakeTensorMode():
            tensors = [torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in tensors]
    if kind == "subclass":
        tensors = [each.as_subclass(Odd) for each in tensors]
    weight, live, table, mask, order = tensors
    assert not gpu.cover(live, table, mask)
    assert not gpu.covered(weight, live, table, weight)
    assert not gpu.gradients(weight, weight, live, table, (weight, weight))
    assert gpu.keep(weight, mask) is None
    assert gpu.decay(weight, weight, weight, 0.1) is None
    assert not gpu.largest_rows(weight, order, 2, 4, weight)


def test_a_weight_under_a_fixed_mask_can_be_differentiated_twice_whatever_its_size() -> None:
    for size in (4, 256):
        weight, mask = torch.randn(size, size, requires_grad=True), torch.rand(size, size) < 0.5
        given = torch.randn(size, size, requires_grad=True)
        (first,) = torch.autograd.grad(torch.ops.nm.masked_weight(weight, mask), weight, given, create_graph=True)
        assert torch.equal(torch.autograd.grad(first.sum(), given)[0], mask.float())
