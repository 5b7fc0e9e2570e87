# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Which weights are planned, which are refused, and with which reason."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import MLP, Attention, ConvNet, Grouped, Matmuls, Oddities, example
from torch import Tensor, nn

import nm_compiler as nm


def plan_of(model: nn.Module, **options: object) -> dict[str, str]:
    """Name to "op pattern" where planned, to the reason where refused."""
    report = nm.report(nm.compile(model, example(model), method=nm.SRSTE(), **options))
    return {row.name: f"{row.op} {row.pattern}" if row.status == "sparse" else row.reason for row in report.rows}


def test_products_written_four_ways_and_convolutions_of_one_and_three_dimensions_are_found() -> None:
    assert {name: text for name, text in plan_of(Matmuls()).items() if ":" in text and "stem" not in text} == {
        "right": "matmul 2:4",
        "transposed": "matmul 2:4",
        "added": "addmm 2:4",
        "conv1.weight": "conv1d 2:4",
        "conv3.weight": "conv3d 2:4",
        "head.weight": "head: no other weight comes after it (include= makes it sparse)",
    }


@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask(), nm.SRSTE(), nm.Magnitude()], ids=str)
def test_a_weight_stored_as_in_by_out_is_sparse_along_its_reduction_axis(method: nm.Method) -> None:
    model = Matmuls()
    sparse = nm.compile(model, example(model), method=method)
    assert {site.name: site.in_axis for site in sparse.plan.sites}["right"] == 0
    x = example(model)
    sparse(x).sum().backward()
    expected = sparse(x)
    frozen = nm.freeze(sparse, finish=True)
    if not isinstance(method, nm.LBC):
        torch.testing.assert_close(frozen(x), expected)
    satisfied = nm.verify(frozen).satisfied
    assert 0 in satisfied["right"]
    assert 0 in satisfied["added"]
    assert 1 in satisfied["transposed"]


def test_every_weight_that_cannot_be_sparse_says_why() -> None:
    reasons = plan_of(Oddities(), include="fc.*")
    expected = {
        "embed.weight": "an embedding",
        "fc.weight": "linear 2:4",
        "depthwise.weight": "depthwise",
        "narrow.weight": "2 input channels in each of 4 conv groups, groups of 2:4 need a multiple of 4",
        "transposed.weight": "a transposed convolution",
        "recurrent.weight_ih_l0": "inside a fused LSTM",
        "recurrent.weight_hh_l0": "inside a fused LSTM",
        "gated.weight_ih_l0": "inside a fused LSTM, GRU",
        "gated.weight_hh_l0": "inside a fused LSTM, GRU",
        "table": "read by aten.add",
        "left": "5 input features, groups of 2:4 need a multiple of 4",
        "unused": "not read by the captured graph",
        "norm.weight": "read by aten.layer_norm",
        "norm.bias": "read by aten.layer_norm",
        "counts": "not floating point (torch.int64)",
        "head.weight": "head",
    }
    assert reasons.keys() == expected.keys()
    for name, start in expected.items():
        assert reasons[name].startswith(start), f"{name}: {reasons[name]}"


def test_a_conjugate_transpose_of_real_weights_is_a_transpose() -> None:
    class Conjugated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.first.H) @ self.second.mH  # [out, in] both

    sparse = nm.compile(Conjugated(), torch.randn(2, 8), include="*", method=nm.SRSTE())
    assert {site.name: (site.op, site.in_axis) for site in sparse.plan.sites} == {
        "first": ("matmul", 1),
        "second": ("matmul", 1),
    }


@pytest.mark.ci(here=["MLP", "ConvNet", "Matmuls", "Grouped"])
@pytest.mark.parametrize("kind", [MLP, ConvNet, Attention, Matmuls, Grouped, Oddities])
def test_every_parameter_of_two_or_more_axes_has_exactly_one_line(kind: type[nn.Module]) -> None:
    model = kind()
    expected = [name for name, p in model.named_parameters() if p.ndim >= 2]
    options = {"include": "fc.*"} if kind is Oddities else {}
    lines = nm.report(nm.compile(model, example(model), **options)).to_dict()["weights"]
    assert [line["name"] for line in lines] == expected
    assert all(line["reason"] for line in lines)
    assert all((line["status"] == "sparse") == (line["pattern"] is not None) for line in lines)


def test_the_stem_and_the_head_stay_dense_unless_included() -> None:
    by_default = plan_of(MLP())
    assert by_default["fc1.weight"].startswith("stem")
    assert by_default["fc3.weight"].startswith("head")
    assert plan_of(MLP(), include="*") == {f"fc{i}.weight": "linear 2:4" for i in (1, 2, 3)}
    assert plan_of(MLP(), include=("fc3.weight",))["fc1.weight"].startswith("stem")


class Recurrent(nn.Module):
    """A loop over time that writes its outputs into memory, as RWKV's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.key, self.value, self.out, self.last = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        key, value = self.key(x), self.value(x)
        memory, state = torch.zeros_like(value), torch.zeros_like(value[:, 0])
        for step in range(x.shape[1]):
            state = 0.5 * state + torch.sigmoid(key[:, step]) * value[:, step]
            memory[:, step] = state
        return self.last(self.out(memory))


def test_what_is_written_to_memory_goes_on_to_the_weights_that_read_it() -> None:
    plan = nm.compile(Recurrent(), (torch.randn(2, 3, 8),), method=nm.SRSTE()).plan
    assert [site.name for site in plan.sites] == ["key.weight", "value.weight", "out.weight"]
    assert [(each.where, each.reason[:4]) for each in plan.refusals] == [("first.weight", "stem"), ("last.weight", "head")]


def test_a_head_tied_to_the_embedding_is_refused_as_shared_and_the_layers_behind_an_embedding_are_no_stem() -> None:
    reasons = plan_of(Attention())
    assert reasons["embed.weight"] == "shared with an embedding: untie them to make it sparse"
    assert reasons["qkv.weight"] == reasons["out.weight"] == "linear 2:4"
    assert reasons["position"].startswith("read by aten")


def test_excluded_globs_win_over_everything_else() -> None:
    assert plan_of(ConvNet(), exclude=["conv1.*"], include="*")["conv1.weight"] == "excluded by 'conv1.*'"


def test_mixed_patterns_follow_their_globs_and_no_match_is_a_reason() -> None:
    found = plan_of(ConvNet(), pattern={"conv1.*": "1:4", "conv2.*": "4:8"})
    assert found["conv1.weight"] == "conv2d 1:4"
    assert found["conv2.weight"] == "conv2d 4:8"
    assert plan_of(ConvNet(), pattern={"conv1.*": "1:4"})["conv2.weight"].startswith("no rule of pattern=")


def test_a_weight_used_twice_is_one_site_and_along_two_axes_a_refusal() -> None:
    class Twice(nn.Module):
        def __init__(self, flip: bool) -> None:
            super().__init__()
            self.stem, self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.flip = flip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.fc(torch.tanh(self.stem(x))))
            again = x @ self.fc.weight if self.flip else self.fc(x)
            return self.head(again)

    x = torch.randn(2, 8)
    assert [s.name for s in nm.compile(Twice(False), x).plan.sites] == ["fc.weight"]
    refusals = {r.where: r.reason for r in nm.compile(Twice(True), x, include="stem*").plan.refusals}
    assert refusals["fc.weight"] == "used along different axes by different products: give each a weight of its own"


def test_output_channels_that_do_not_divide_keep_the_forward_mask_backward_and_the_report_says_so() -> None:
    model = Grouped()
    rows = {row.name: row for row in nm.report(nm.compile(model, example(model), method=nm.BiMask())).rows}
    assert rows["narrow.weight"].reason == "backward mask = forward mask: 6 output channels, not a multiple of 4"
    assert rows["narrow.weight"].backward_kept is None
    assert 0.5 < (rows["grouped.weight"].backward_kept or 0) < 1
    assert not hasattr(model.narrow, "weight_order")


def test_parameters_tied_under_two_names_appear_once_under_the_first() -> None:
    model = MLP()
    model.alias = model.fc2
    sparse = nm.compile(model, example(model))
    assert [site.name for site in sparse.plan.sites] == ["fc2.weight"]


class Computed(nn.Module):
    """One weight, read by what ``call`` makes of it; ``other`` is there to be read as well."""

    def __init__(self, call: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.call, self.fc = call, nn.Linear(8, 8)
        self.w, self.other = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.fc(x), self.w, self.other)


@pytest.mark.ci(here=["shape0-", "shape1-", "shape2-", "shape3-", "shape9-", "shape15-", "shape19-"])
@pytest.mark.parametrize(
    ("shape", "call", "reason"),
    [
        ((8, 8), lambda x, w, o: x[:, :6] @ w[:, :6].T, "a product reads inputs 0 to 5 of 8 by themselves, which cuts groups"),
        ((8, 8), lambda x, w, o: x[:, ::2] @ w[:, ::2].T, "its product reads weights 2 apart"),
        ((8, 4, 3, 3), lambda x, w, o: x.repeat(1, 5)[:, :36] @ w.flatten(1).T, "3 weights along axis 3, groups of 2:4"),
        ((4, 16), lambda x, w, o: x @ w.T.contiguous().view(8, 8), "aten.view mixes its axes"),
        ((8, 8), lambda x, w, o: F.linear(x, w[:, torch.arange(7, -1, -1)]), "indexed along the axis that its product sums over"),
        ((8, 1), lambda x, w, o: F.linear(x, w.expand(8, 8)), "expanded along the axis that its product sums over"),
        ((8, 8), lambda x, w, o: F.linear(x, torch.cat([w, o])), "joined with other weights before its product"),
        ((8, 8), lambda x, w, o: F.linear(x, w + o), "read by aten.add.Tensor, which has no N:M rule: behind it zeros are no longer"),
        ((8, 8), lambda x, w, o: F.linear(x, w - w.mean()), "read by aten.mean"),
        ((8, 8), lambda x, w, o: F.linear(x, w @ o), "multiplied with another weight before any data"),
        ((8, 8), lambda x, w, o: x @ (w @ w), "multiplied with itself"),
        ((8, 8), lambda x, w, o: F.linear(w, o) + x[:1], "the input of a linear, not its weight"),
        ((8, 8, 8), lambda x, w, o: F.bilinear(x, x, w), "bilinear sums over two axes"),
        ((8, 8), lambda x, w, o: torch.einsum("bi,oi,bi->bo", x, w, x), "an einsum of 3 tensors"),
        ((8, 8), lambda x, w, o: torch.einsum("bi,ii->b", x, w)[:, None], "an einsum that reads a diagonal"),
        ((8, 8), lambda x, w, o: torch.einsum("bi,bi->b", x[:8], w[:2])[:, None], "no output axis"),
        ((8, 8), lambda x, w, o: torch.einsum("bi,oi->bi", x, w), "einsum sums over one of its axes before the product"),
        ((1, 8), lambda x, w, o: (x * w) @ o, "read by aten.mul.Tensor, which has no N:M rule"),
        ((5, 8), lambda x, w, o: x + w[torch.tensor([0, 1, 1, 4])].view(2, 2, 8).mT.contiguous().sigmoid().sum(2)[0], "read by aten.add"),
        ((8, 8), lambda x, w, o: torch.addmm(x[0], x, w, alpha=2), "addmm with alpha or beta other than 1"),
    ],
)  # fmt: skip
def test_a_weight_that_groups_cannot_be_told_apart_in_is_refused_with_the_reason(
    shape: tuple[int, ...], call: Callable[..., torch.Tensor], reason: str
) -> None:
    model, x = Computed(call, shape), torch.randn(2, 8)
    plan = nm.compile(model, x, include="*", dynamic_shapes=({},) if reason == "no output axis" else None).plan
    assert {refusal.where: refusal.reason for refusal in plan.refusals}["w"].startswith(reason)


def test_weight_standardisation_is_refused_because_zeros_would_not_stay_zeros() -> None:
    def standardised(x: torch.Tensor, w: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        plain = F.batch_norm(w.reshape(1, 8, -1), None, None, training=True).reshape_as(w)
        return F.conv1d(x[..., None], plain)[..., 0]

    model = Computed(standardised, (8, 8, 1))
    reasons = {r.where: r.reason for r in nm.compile(model, torch.randn(2, 8), include="*").plan.refusals}
    assert "zeros are no longer zeros, so use a layer whose weight is a plain parameter" in reasons["w"]


def test_a_buffer_that_multiplies_data_has_a_line_with_the_way_out_and_a_frozen_parameter_is_planned() -> None:
    class Fixed(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
            self.register_buffer("mask", torch.ones(8, 8))
            basis = torch.randn(8, 8)
            if kind == "buffer":
                self.register_buffer("basis", basis)
            else:
                self.basis = nn.Parameter(basis, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.linear(x, self.fc.weight * self.mask) @ self.basis)

    sparse = nm.compile(Fixed("buffer"), torch.randn(2, 8), include="*")
    rows = {row.name: row for row in nm.report(sparse).rows}
    assert set(rows) == {"fc.weight", "head.weight", "basis"}  # a mask is a factor, no weight
    assert (rows["basis"].op, rows["basis"].status) == ("matmul", "dense")
    assert rows["basis"].reason == "a buffer, not a parameter: make it an nn.Parameter(requires_grad=False) to make it sparse"
    for method in (nm.LBC(), nm.BiMask(), nm.Magnitude()):
        again = nm.compile(Fixed("parameter"), torch.randn(2, 8), method=method)
        assert "basis" in {site.name for site in again.plan.sites}
        again(torch.randn(2, 8)).sum().backward()
        assert again.basis.grad is None
        assert "basis" in nm.verify(nm.freeze(again, finish=True)).satisfied
