# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Weights behind products that are no plain linear: the papers' formulas for each, to 1e-12, with masks made by NumPy loops."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import nm_compiler as nm
from nm_compiler.graph import show_graph
from nm_compiler.solvers.combinations import pack

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
EXPERTS = 3


@dataclass(frozen=True)
class Case:
    """y = call(x, w); axes: a letter for each axis of w, e for experts, o for outputs, i for inputs, t for other sums."""

    name: str
    call: Callable[[Tensor, Tensor], Tensor]
    weight: tuple[int, ...]
    axes: str
    data: tuple[int, ...]
    blocks: int = 1

    def __str__(self) -> str:
        return self.name


def chunks(x: Tensor, w: Tensor) -> Tensor:
    query, key, value = w.chunk(3)
    return torch.cat([x @ query.T, F.linear(2 * x, key), torch.tanh(x) @ value.T], -1)


def uneven(x: Tensor, w: Tensor) -> Tensor:
    query, rest = w.split([8, 16])
    return torch.cat([F.linear(x, query), F.linear(x.square(), rest)], -1)


def chosen(x: Tensor, w: Tensor) -> Tensor:
    expert = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return torch.bmm(w[expert], x.unsqueeze(-1)).squeeze(-1)


def added(x: Tensor, w: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return torch.baddbmm(torch.ones_like(x[..., :1]), x, w).transpose(0, 1)


CASES = [
    Case("bmm", lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (EXPERTS, 16, 8), "eio", (5, EXPERTS, 16)),
    Case("bmm, transposed", lambda x, w: torch.bmm(x.mT.permute(2, 0, 1), w.mT), (EXPERTS, 8, 16), "eoi", (5, EXPERTS, 16)),
    Case("baddbmm", added, (EXPERTS, 16, 8), "eio", (5, EXPERTS, 16)),
    Case("matmul, one x for all experts", lambda x, w: x[:, None, None] @ w, (EXPERTS, 16, 8), "eio", (5, 16)),
    Case("matmul from the left", lambda x, w: (w @ x.T).T, (8, 16), "oi", (5, 16)),
    Case("matmul from the left, batched", lambda x, w: w @ x.mT, (8, 16), "oi", (5, 4, 16)),
    Case("mv", lambda x, w: torch.mv(w, x[0]) + x[:, :8], (8, 16), "oi", (5, 16)),
    Case("einsum", lambda x, w: torch.einsum("bi,oi->bo", x, w), (8, 16), "oi", (5, 16)),
    Case("einsum of experts", lambda x, w: torch.einsum("bei,eoi->beo", x, w), (EXPERTS, 8, 16), "eoi", (5, EXPERTS, 16)),
    Case("einsum that sums experts", lambda x, w: torch.einsum("bei,eoi", x, w), (EXPERTS, 8, 16), "toi", (5, EXPERTS, 16)),
    Case("einsum, experts first", lambda x, w: torch.einsum("...d,edf->e...f", x, w), (EXPERTS, 16, 8), "eio", (5, 4, 16)),
    Case("einsum to heads", lambda x, w: torch.einsum("bi,hdi->bhd", x, w), (EXPERTS, 8, 16), "eoi", (5, 16)),
    Case("einsum from heads", lambda x, w: torch.einsum("bhd,hdo->bo", x, w), (EXPERTS, 16, 8), "tio", (5, EXPERTS, 16)),
    Case("einsum that sums x", lambda x, w: torch.einsum("bsi,oi->bo", x, w), (8, 16), "oi", (5, 4, 16)),
    Case("tensordot", lambda x, w: torch.tensordot(x, w, ([1], [0])), (16, 8), "io", (5, 16)),
    Case("inner", lambda x, w: torch.inner(x, w), (8, 16), "oi", (5, 16)),
    Case("chunks of in_proj_weight", chunks, (24, 16), "oi", (5, 16), blocks=3),
    Case("uneven splits", uneven, (24, 16), "oi", (5, 16), blocks=3),
    Case("slices of the inputs", lambda x, w: x[:, :4] @ w[:, :4].T - x[:, 4:] @ w[:, 4:].T, (8, 16), "oi", (5, 16)),
    Case("experts in a loop", lambda x, w: torch.stack([F.linear(x, one) for one in w.unbind()]), (EXPERTS, 8, 16), "eoi", (5, 16)),
    Case("experts by an index", chosen, (EXPERTS, 8, 16), "eoi", (5, 16)),
    Case("a convolution as a linear", lambda x, w: F.linear(x, w.flatten(1)), (8, 16, 1, 1), "oitt", (5, 16)),
    Case("a linear as a convolution", lambda x, w: F.conv1d(x, w.unsqueeze(-1)), (8, 16), "oi", (5, 16, 4)),
    Case("a constant scale", lambda x, w: F.linear(x, 0.5 * w / torch.arange(1.0, 9.0).double()[:, None]), (8, 16), "oi", (5, 16)),
]  # fmt: skip
FEW = [case for case in CASES if case.name in ("bmm", "einsum to heads", "chunks of in_proj_weight", "uneven splits")]


class Product(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.call = case.call
        self.w = nn.Parameter(torch.randn(case.weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w)


def compiled(case: Case, method: nm.Method, pattern: str = "2:4") -> tuple[nm.SparseModule, Tensor]:
    x = torch.randn(case.data, dtype=torch.float64)
    return nm.compile(Product(case), x, pattern=pattern, method=method, include="*"), x.requires_grad_()


def by_expert(case: Case, w: Any) -> list[Any]:
    """The weight of every expert as [o, i, t, 1], the reference's layout: views."""
    missing = [axis for axis in "eoit" if axis not in case.axes]
    axes = sorted(range(len(case.axes)), key=lambda a: "eoit".index(case.axes[a]))
    moved = np.transpose(w, axes)
    if "e" in missing:
        moved = moved[None]
    return [one.reshape(*one.shape[:2], -1, 1) for one in moved]


def masks_by_expert(case: Case, w: Any, make: Callable[[int, Any], Any]) -> Any:
    """A mask of the weight's shape from a function of (expert, weight [o, i, t, 1])."""
    mask = np.zeros(w.shape)
    for number, (source, target) in enumerate(zip(by_expert(case, w), by_expert(case, mask), strict=True)):
        assert np.shares_memory(target, mask)
        target[...] = make(number, source)
    return mask


def gradients(case: Case, x: Tensor, w: Any, g: Tensor) -> tuple[Any, Any, Any]:
    """y, dx and dw of the user's own dense code with weight w."""
    data, weight = x.detach().clone().requires_grad_(), torch.tensor(w, requires_grad=True)
    y = case.call(data, weight)
    dx, dw = torch.autograd.grad(y, (data, weight), g)
    return y.detach().numpy(), dx.numpy(), dw.numpy()


def orders(site: Any) -> Tensor:
    block = site.out // site.blocks
    rows = [torch.randperm(block) + first for first in range(0, site.out, block)]
    lead = int(np.prod(site.leading[:-1]))
    shuffled = [torch.cat([torch.randperm(block) + first for first in range(0, site.out, block)]) for _ in range(lead)]
    return torch.stack(shuffled or [torch.cat(rows)]).view(site.leading)


@pytest.mark.ci
@pytest.mark.parametrize(("case", "text"), [(case, "2:4") for case in CASES] + [(case, "4:8") for case in FEW], ids=str)
def test_bimask_computes_the_papers_forward_and_all_gradients(case: Case, text: str) -> None:
    sparse, x = compiled(case, nm.BiMask(decay=0.03), text)
    (weight,) = sparse.weights
    site, n, m = weight.site, weight.site.pattern.n, weight.site.pattern.m
    assert site.blocks == case.blocks
    order = orders(site)
    weight["order"].copy_(order)
    w = weight.param.detach().numpy()
    forward = masks_by_expert(case, w, lambda _, one: ref.forward_mask(one, n, m))
    each = order.view(-1, site.out).tolist()
    backward = masks_by_expert(case, w, lambda e, one: ref.backward_mask(one, ref.forward_mask(one, n, m), each[e], n, m))
    assert (backward != forward).any()

    y = sparse(x)
    g = torch.randn_like(y)
    y.backward(g)
    expected, _, dense = gradients(case, x, w * forward, g)
    np.testing.assert_allclose(y.detach(), expected, **TOLERANCE)
    _, dx, _ = gradients(case, x, w * backward, g)
    np.testing.assert_allclose(x.grad, dx, **TOLERANCE)
    np.testing.assert_allclose(weight.param.grad, dense + 0.03 * (1 - forward) * w, **TOLERANCE)


@pytest.mark.ci
@pytest.mark.parametrize(("case", "layout"), [(c, "combination") for c in CASES] + [(c, "position") for c in FEW], ids=str)
def test_lbc_computes_the_papers_weight_and_score_gradients(case: Case, layout: Any) -> None:
    sparse, x = compiled(case, nm.LBC(scores=layout))
    (weight,) = sparse.weights
    live = torch.rand(*weight.site.leading, weight.site.groups_per_row, 6) < 0.4
    live[..., 0] |= ~live.any(-1)
    weight["live"].copy_(pack(live) if layout == "position" else live.to(torch.uint8))
    w, alive = weight.param.detach().numpy(), live.view(-1, *live.shape[-3:]).numpy()
    mask = masks_by_expert(case, w, lambda e, one: ref.lbc_mask(alive[e], one.shape, 2, 4))

    y = sparse(x)
    g = torch.randn_like(y)
    y.backward(g)
    expected, dx, dense = gradients(case, x, w * mask, g)
    np.testing.assert_allclose(y.detach(), expected, **TOLERANCE)
    np.testing.assert_allclose(x.grad, dx, **TOLERANCE)
    np.testing.assert_allclose(weight.param.grad, mask * dense, **TOLERANCE)
    scores = weight["scores"].grad
    for e, (one, g_one) in enumerate(zip(by_expert(case, w), by_expert(case, dense), strict=True)):
        wanted = ref.lbc_score_gradient(alive[e], one, g_one, 2, 4)
        if layout == "combination":
            np.testing.assert_allclose(scores.view(-1, *wanted.shape)[e], wanted, **TOLERANCE)
            continue
        got = by_expert(case, scores.numpy())[e]
        for o, number, r, s, first in ref.groups(one.shape, 4):
            for c, kept in enumerate(itertools.combinations(range(4), 2)):
                if alive[e][o, number, c] and alive[e][o, number].sum() > 1:
                    total = sum(got[o, first + j, r, s] for j in kept)
                    assert total == pytest.approx(wanted[o, number, c], rel=1e-12, abs=1e-12)


METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(interval=1), nm.SRSTE(), nm.Magnitude()]


@pytest.mark.ci(here=["bmm-LBC0", "experts in a loop", "a convolution as a linear"])
@pytest.mark.parametrize(
    ("case", "method"),
    [(case, METHODS[2]) for case in CASES[1::2]]
    + [(case, method) for case in FEW[:2] for method in METHODS if method is not METHODS[2]],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_few_steps_end_exactly_n_of_m_in_the_users_own_module(case: Case, method: nm.Method) -> None:
    sparse, x = compiled(case, method)
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    for _ in range(4):
        sparse(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    expected, row = sparse(x), nm.report(sparse).rows[0]
    assert (row.status, row.nonzero) == ("sparse", 0.5)
    model = nm.freeze(sparse)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(sparse.graph(False)(x)[0], expected)
    assert "nm." not in show_graph(sparse.graph(False))
    kept = masks_by_expert(case, (model.w.detach().numpy() != 0).astype(float), lambda _, one: one)
    for one in by_expert(case, kept):
        assert {one[o, first : first + 4, r, s].sum() for o, _, r, s, first in ref.groups(one.shape, 4)} == {2}
    assert case.axes.index("i") in nm.verify(model).satisfied["w"]


@pytest.mark.ci
@pytest.mark.parametrize("case", FEW[:3], ids=str)
def test_there_are_no_more_products_than_in_the_dense_model(case: Case) -> None:
    def products(model: nn.Module) -> int:
        x = torch.randn(case.data, dtype=torch.float64, requires_grad=True)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            y = model(x)
            y.backward(torch.randn_like(y))
        leaves = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mkldnn_convolution", "aten::convolution_backward",
                  "aten::thnn_conv2d", "aten::_slow_conv2d_forward", "aten::mv", "aten::addmv_")  # fmt: skip
        return sum(event.count for event in found.key_averages() if event.key in leaves)

    sparse, _ = compiled(case, nm.BiMask())
    assert products(sparse) == products(Product(case))


def test_state_of_experts_leads_with_the_expert_so_that_it_can_be_sharded_with_the_weight() -> None:
    case = CASES[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for method in METHODS:
        sparse, _ = compiled(case, method)
        shapes |= {f"{method.name} {getattr(method, 'scores', '')} {name}": tuple(value.shape)
                   for name, value in sparse.state_dict().items() if name.startswith("w_")}  # fmt: skip
    assert shapes == {
        "LBC position w_scores": (3, 16, 8), "LBC position w_live": (3, 8, 4, 1),
        "LBC combination w_scores": (3, 8, 4, 6), "LBC combination w_live": (3, 8, 4, 6),
        "BiMask  w_order": (3, 8), "Magnitude  w_mask": (3, 16),
    }  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("method", METHODS, ids=["lbc", "lbc_combination", "bimask", "srste", "magnitude"])
def test_a_checkpoint_of_experts_resumes_to_the_bit_and_damaged_state_is_refused(method: nm.Method) -> None:
    runs = [compiled(CASES[1], method) for _ in range(2)]
    (first, x), (second, _) = runs
    nm.SparsityScheduler(first, total_steps=4).step()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    state = first.state_dict()
    if isinstance(method, nm.BiMask):
        state["w_order"] = state["w_order"].clone()
        state["w_order"][1, 0] = state["w_order"][1, 1]
        with pytest.raises(nm.NMError, match="not a permutation"):
            second.load_state_dict(state)
    if isinstance(method, nm.LBC):
        state["w_live"] = torch.zeros_like(state["w_live"])
        with pytest.raises(nm.NMError, match="live entries"):
            second.load_state_dict(state)


def test_orders_never_cross_the_slices_of_an_in_proj_weight() -> None:
    sparse, _ = compiled(next(case for case in CASES if case.call is chunks), nm.BiMask())
    weight = sparse.weights[0]
    nm.SparsityScheduler(sparse, total_steps=2).step()
    order = weight["order"]
    assert not torch.equal(order, torch.arange(24))
    assert torch.equal(order.view(3, 8).sort(-1).values, torch.arange(24).view(3, 8))


@pytest.mark.ci
def test_a_compiled_graph_of_experts_and_einsums_trains_as_the_eager_one() -> None:
    for case in (CASES[0], CASES[9]):
        sparse, x = compiled(case, nm.BiMask())
        y = sparse(x)
        y.square().sum().backward()
        eager = (y.detach(), x.grad.clone(), sparse.w.grad.clone())
        x.grad = sparse.w.grad = None
        out = torch.compile(sparse, backend="aot_eager", fullgraph=True)(x)
        out.square().sum().backward()
        for got, expected in zip((out.detach(), x.grad, sparse.w.grad), eager, strict=True):
            torch.testing.assert_close(got, expected)


def test_weight_norm_scales_the_rows_of_an_n_of_m_weight_and_bimask_takes_its_scale_from_the_forward_weight() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8).double())
    sparse = nm.compile(layer, torch.randn(2, 16, dtype=torch.float64), method=nm.BiMask(decay=0.0), include="*")
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    weight = sparse.weights[0]
    assert weight.site.name == "parametrizations.weight.original1"
    y = sparse(x)
    g = torch.randn_like(y)
    y.backward(g)
    w, scale = weight.param.detach().numpy(), layer.parametrizations.weight.original0.detach().numpy()
    four = w[:, :, None, None]
    forward = ref.forward_mask(four, 2, 4)
    backward = ref.backward_mask(four, forward, list(range(8)), 2, 4)[:, :, 0, 0]
    masked = w * forward[:, :, 0, 0]
    factor = scale / np.linalg.norm(masked, axis=1, keepdims=True)
    np.testing.assert_allclose(y.detach(), x.detach().numpy() @ (factor * masked).T + layer.bias.detach().numpy(), **TOLERANCE)
    np.testing.assert_allclose(x.grad, g.numpy() @ (factor * w * backward), **TOLERANCE)
    frozen = nm.freeze(sparse)
    torch.testing.assert_close(frozen(x), y)
    assert bool(((frozen.weight != 0).view(8, 4, 4).sum(-1) == 2).all())


def test_spectral_norm_stays_the_models_own_and_its_weight_becomes_n_of_m() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
    sparse = nm.compile(layer, torch.randn(2, 8, 5, 5), method=nm.BiMask(), include="*")
    assert [site.name for site in sparse.plan.sites] == ["parametrizations.weight.original"]
    sparse.eval()
    x = torch.randn(2, 8, 5, 5)
    expected = sparse(x)
    torch.testing.assert_close(nm.freeze(sparse).eval()(x), expected)


class Bank(nn.Module):
    """Products of every new kind, small enough to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.in_proj_weight = nn.Parameter(torch.randn(24, 16))
        self.experts = nn.Parameter(torch.randn(2, 8, 16))
        self.left = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        query, key, value = self.in_proj_weight.chunk(3)
        x = torch.tanh(F.linear(x, query) * F.linear(x, key) + F.linear(x, value))
        x = torch.tanh(torch.einsum("bi,eio->beo", x, self.experts).sum(1))
        return self.head(torch.tanh(self.left @ x.T).T)


@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask()], ids=["lbc", "bimask"])
def test_the_inserted_graph_is_as_read(method: nm.Method, golden: Callable[[str, str], None]) -> None:
    sparse = nm.compile(Bank(), torch.randn(2, 8), method=method)
    golden(f"insert_{method.name.lower()}_bank", nm.show(sparse))
    nm.freeze(sparse, finish=True)
    if isinstance(method, nm.BiMask):
        golden("freeze_bimask_bank", nm.show(sparse))


def test_autocast_casts_an_einsum_and_keeps_the_masters_in_float32() -> None:
    sparse = nm.compile(Bank(), torch.randn(2, 8), method=nm.BiMask())
    x = torch.randn(6, 8)
    exact = sparse(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.3)
    assert sparse.experts.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "weight", "data"),
    [
        (F.linear, (4, 4), (2, 3, 4)),
        (F.conv1d, (4, 4, 1), (2, 4, 5)),
        (torch.bmm, (2, 4, 4), (2, 3, 4)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_product_with_two_weights_returns_can_be_changed_in_place(call: Any, weight: Any, data: Any) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(weight))

        def forward(self, x: Tensor) -> Tensor:
            return call(x, self.weight).relu_()

    x = torch.randn(data, requires_grad=True)
    sparse = nm.compile(InPlace(), (x,), method=nm.BiMask(), include="weight")
    assert "nm." in nm.show(sparse)
    y = sparse(x)
    torch.testing.assert_close(y, call(x, sparse.masked("weight")[0]).relu())
    y.sum().backward()
    assert x.grad is not None
