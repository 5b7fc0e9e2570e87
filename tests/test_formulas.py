# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The methods against an independent NumPy transcription of the papers, float64, to 1e-12."""

import itertools
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from torch import nn

import nm_compiler as nm
from nm_compiler.solvers.combinations import pack

LAYERS = ["linear", "conv1x1", "conv3x3 strided"]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def layer_of(kind: str) -> tuple[nn.Module, torch.Tensor, tuple[int, int]]:
    """A float64 layer with 16 inputs and outputs, an input for it, and (stride, padding)."""
    generator = torch.Generator().manual_seed(1)
    if kind == "linear":
        return nn.Linear(16, 16).double(), torch.randn(3, 16, dtype=torch.float64, generator=generator), (1, 0)
    taps, stride, pad = (1, 1, 0) if kind == "conv1x1" else (3, 2, 1)
    layer = nn.Conv2d(16, 16, taps, stride=stride, padding=pad).double()
    return layer, torch.randn(3, 16, 5, 7, dtype=torch.float64, generator=generator), (stride, pad)


def as_4d(tensor: torch.Tensor) -> Any:
    array = tensor.detach().numpy()
    return array.reshape(*array.shape, *[1] * (4 - array.ndim))


def run(sparse: nm.SparseModule, x: torch.Tensor) -> tuple[Any, Any, Any]:
    """Forward and backward with a random gradient. Returns y, g and dx as 4-D arrays."""
    x = x.clone().requires_grad_()
    y = sparse(x)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y.backward(g)
    assert x.grad is not None
    return as_4d(y), as_4d(g), as_4d(x.grad)


@pytest.mark.ci(here=["2:4", "linear-4:8", "linear-1:4-position"])
@pytest.mark.parametrize("layout", ["combination", "position"])
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "2:8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_lbc_computes_the_papers_forward_weight_gradient_and_score_gradient(kind: str, text: str, layout: Any) -> None:
    layer, x, (stride, pad) = layer_of(kind)
    sparse = nm.compile(layer, x, pattern=text, method=nm.LBC(scores=layout), include="*")
    weight = sparse.weights[0]
    pattern, w = weight.site.pattern, as_4d(weight.param)
    live = torch.rand(16, weight.site.groups_per_row, pattern.combinations) < 0.4
    live[..., 0] |= ~live.any(-1)
    live[0] = False
    live[0, :, 1] = True  # the first row is decided
    weight["live"].copy_(pack(live) if layout == "position" else live.to(torch.uint8))

    y, g, dx = run(sparse, x)
    mask = ref.lbc_mask(live.numpy(), w.shape, pattern.n, pattern.m)
    np.testing.assert_allclose(y, ref.convolve(as_4d(x), w * mask, as_4d(layer.bias)[:, 0, 0, 0], stride, pad), **TOLERANCE)
    np.testing.assert_allclose(dx, ref.grad_input(g, w * mask, dx.shape, stride, pad), **TOLERANCE)
    dense = ref.grad_weight(g, as_4d(x), w.shape, stride, pad)
    np.testing.assert_allclose(as_4d(weight.param.grad), mask * dense, **TOLERANCE)
    np.testing.assert_allclose(layer.bias.grad, g.sum((0, 2, 3)), **TOLERANCE)
    expected = ref.lbc_score_gradient(live.numpy(), w, dense, pattern.n, pattern.m)
    scores = weight["scores"].grad
    if layout == "combination":
        np.testing.assert_allclose(scores, expected, **TOLERANCE)
        return
    got, combinations = as_4d(scores), list(itertools.combinations(range(pattern.m), pattern.n))
    for o, number, r, s, first in ref.groups(w.shape, pattern.m):  # sum over c of its positions, for live c
        for c in np.flatnonzero(live[o, number].numpy()):
            total = sum(got[o, first + j, r, s] for j in combinations[c])
            assert total == pytest.approx(expected[o, number, c], rel=1e-12, abs=1e-12)


@pytest.mark.ci(here=["2:4", "linear-1:16", "conv1x1-4:8"])
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "2:8", "1:16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_bimask_computes_the_papers_forward_and_all_gradients(kind: str, text: str) -> None:
    layer, x, (stride, pad) = layer_of(kind)
    sparse = nm.compile(layer, x, pattern=text, method=nm.BiMask(decay=0.03), include="*")
    weight = sparse.weights[0]
    pattern, w = weight.site.pattern, as_4d(weight.param)
    order = torch.randperm(16)
    weight["order"].copy_(order)

    y, g, dx = run(sparse, x)
    forward = ref.forward_mask(w, pattern.n, pattern.m)
    backward = ref.backward_mask(w, forward, order.tolist(), pattern.n, pattern.m)
    assert (backward != forward).sum() > 0
    bias = as_4d(layer.bias)[:, 0, 0, 0]
    np.testing.assert_allclose(y, ref.convolve(as_4d(x), w * forward, bias, stride, pad), **TOLERANCE)
    np.testing.assert_allclose(dx, ref.grad_input(g, w * backward, dx.shape, stride, pad), **TOLERANCE)
    dense = ref.grad_weight(g, as_4d(x), w.shape, stride, pad)
    np.testing.assert_allclose(as_4d(weight.param.grad), dense + 0.03 * (1 - forward) * w, **TOLERANCE)
    np.testing.assert_allclose(layer.bias.grad, g.sum((0, 2, 3)), **TOLERANCE)


@pytest.mark.parametrize("kind", LAYERS)
def test_srste_is_bimask_with_the_forward_mask_in_both_directions(kind: str) -> None:
    layer, x, (stride, pad) = layer_of(kind)
    sparse = nm.compile(layer, x, method=nm.SRSTE(decay=0.5), include="*")
    w = as_4d(sparse.weights[0].param)
    y, g, dx = run(sparse, x)
    forward = ref.forward_mask(w, 2, 4)
    np.testing.assert_allclose(y, ref.convolve(as_4d(x), w * forward, as_4d(layer.bias)[:, 0, 0, 0], stride, pad), **TOLERANCE)
    np.testing.assert_allclose(dx, ref.grad_input(g, w * forward, dx.shape, stride, pad), **TOLERANCE)
    dense = ref.grad_weight(g, as_4d(x), w.shape, stride, pad)
    np.testing.assert_allclose(as_4d(sparse.weights[0].param.grad), dense + 0.5 * (1 - forward) * w, **TOLERANCE)


def test_a_fixed_mask_passes_gradients_to_the_kept_weights_only() -> None:
    layer, x, _ = layer_of("linear")
    sparse = nm.compile(layer, x, method=nm.Magnitude(), include="*")
    w = as_4d(sparse.weights[0].param)
    _, g, _ = run(sparse, x)
    mask = ref.forward_mask(w, 2, 4)
    expected = mask * ref.grad_weight(g, as_4d(x), w.shape, 1, 0)
    np.testing.assert_allclose(as_4d(sparse.weights[0].param.grad), expected, **TOLERANCE)


def test_the_decay_is_added_once_however_large_the_batch_or_often_the_weight_is_used() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16, bias=False).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(self.fc(x)))

    for method in (nm.BiMask(decay=0.1), nm.SRSTE(decay=0.1)):
        model = Twice()
        sparse = nm.compile(model, torch.randn(64, 16, dtype=torch.float64), method=method, include="*")
        (sparse(torch.randn(64, 16, dtype=torch.float64)) * 0).sum().backward()
        w = as_4d(model.fc.weight)
        np.testing.assert_allclose(as_4d(model.fc.weight.grad), 0.1 * (1 - ref.forward_mask(w, 2, 4)) * w, **TOLERANCE)
