# mypy: disable-error-code="no-untyped-call,operator,union-attr"
"""A method with a backward mask of its own: only the gradient of a product's input goes through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from models import MLP, ConvNet, example
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.graph import Pass
from nm_compiler.ops.define import backward_op, weight_op
from nm_compiler.passes.insert_backward_op import insert_backward_op
from nm_compiler.passes.insert_op import insert_op
from nm_compiler.sites.plan import Site
from nm_compiler.solvers.magnitude import magnitude_mask


@weight_op("own::two_forward", gradient=lambda g, *rest: g)
def forward(weight: Tensor, n: int, m: int, in_axis: int) -> Tensor:
    return weight * magnitude_mask(weight, n, m, in_axis)


@backward_op("own::two_backward")
def backward(masked: Tensor, share: Tensor, n: int, m: int, out_axis: int) -> Tensor:
    return share * masked * magnitude_mask(masked, n, m, out_axis)


@dataclass(frozen=True, slots=True)
class TwoMasks(nm.Method):
    """The largest of a group forward, the largest of those along the outputs backward, a share of them."""

    op: object = backward

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        both = [site for site in sites if site.backward_groups]
        return [
            partial(insert_op, sites=sites, op=forward, options=lambda s: (s.pattern.n, s.pattern.m, s.in_axis)),
            partial(
                insert_backward_op, sites=both, op=self.op, state=("share",),
                options=lambda s: (s.pattern.n, s.pattern.m, s.out_axis),
            ),
        ]  # fmt: skip

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return {"share": weight.new_full((), 0.5)}

    def suffixes(self, site: Site) -> tuple[str, ...]:
        return ("share",)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_the_input_gradient_goes_through_the_backward_mask_and_that_of_the_weight_does_not(live: bool) -> None:
    torch.manual_seed(0)
    model = MLP().double()
    x = example(model).double()
    sparse = nm.compile(model, method=TwoMasks(), then="aot_eager") if live else nm.compile(model, x, method=TwoMasks())
    loss = sparse(x).square().sum()
    loss.backward()
    weight = model.fc2.weight.detach()
    kept = weight * magnitude_mask(weight, 2, 4, 1)
    turned = 0.5 * kept * magnitude_mask(kept, 2, 4, 0)
    hidden = torch.relu(model.fc1(x))
    inner = hidden.detach()
    middle = nn.functional.linear(inner, kept, model.fc2.bias).requires_grad_()
    output = model.fc3(torch.relu(middle)).square().sum()
    torch.testing.assert_close(loss, output)
    g = torch.autograd.grad(output, middle)[0]
    torch.testing.assert_close(model.fc2.weight.grad, g.t() @ inner)
    expected = torch.autograd.grad(hidden, model.fc1.weight, g @ turned)[0]
    torch.testing.assert_close(model.fc1.weight.grad, expected)
    row = next(row for row in nm.report(sparse).rows if row.name == "fc2.weight")
    assert row.backward_kept == pytest.approx(float(turned.abs().sum() / kept.abs().sum()))
    assert nm.verify(nm.freeze(sparse)).satisfied == {"fc2.weight": (1,)}


def test_a_convolution_trains_with_it_and_freezes_to_a_plain_one() -> None:
    model = ConvNet()
    sparse = nm.compile(model, example(model), method=TwoMasks())
    assert "own.two_backward" in nm.show(sparse)
    sparse(example(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(nm.verify(nm.freeze(sparse)).satisfied) == {"conv1.weight", "conv2.weight"}


def test_the_graph_is_as_read(golden: Callable[[str, str], None]) -> None:
    model = MLP()
    golden("insert_backward_op_mlp", nm.show(nm.compile(model, example(model), method=TwoMasks())))


def test_an_op_that_was_not_made_for_it_is_refused() -> None:
    with pytest.raises(nm.NMError, match="own.two_forward.default.*nm_compiler.ops.define.backward_op"):
        nm.compile(MLP(), example(MLP()), method=TwoMasks(op=forward))


@dataclass(frozen=True, slots=True)
class Learning(TwoMasks):
    """The share of the backward mask as a Parameter."""

    def state(self, site: Site, weight: Tensor) -> dict[str, Tensor]:
        return {"share": nn.Parameter(weight.new_full((), 0.5))}


@dataclass(frozen=True, slots=True)
class Sharing(Learning):
    """The forward op reads it as well, and gives it a gradient."""

    def passes(self, sites: Sequence[Site]) -> list[Pass]:
        ahead = partial(insert_op, sites=sites, op=shared, options=lambda s: (s.pattern.n, s.pattern.m, s.in_axis))
        return [partial(ahead, state=("share",)), *TwoMasks.passes(self, sites)[1:]]


@weight_op("own::shared_forward", gradient=lambda g, weight, *rest: (g, (g * weight).sum()))
def shared(weight: Tensor, share: Tensor, n: int, m: int, in_axis: int) -> Tensor:
    return share * weight * magnitude_mask(weight, n, m, in_axis)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_state_that_would_learn_but_that_only_the_backward_op_reads_is_an_error(live: bool) -> None:
    def called(method: nm.Method) -> nn.Module:
        model = MLP()
        sparse = nm.compile(model, method=method, then="eager") if live else nm.compile(model, example(model), method=method)
        sparse(example(model)).sum().backward()
        return sparse

    with pytest.raises(
        nm.NMError, match=r"fc2.weight_share of shape \[\] is a Parameter, but only own.two_backward.* reads it"
    ):
        called(Learning())
    assert called(Sharing()).fc2.weight_share.grad.abs() > 0
