# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Every nm:: op by itself: opcheck, and the situations a real layer gets into."""

import copy
import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Grouped, example
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

import nm_compiler as nm
from nm_compiler.live.live import _OF_LOWERED
from nm_compiler.ops.define import weight_op
from nm_compiler.ops.weights import BACKWARD, MASKED
from nm_compiler.pattern import Pattern, combination_table
from nm_compiler.runtime.native import ops as _packed_ops  # noqa: F401 - registers them
from nm_compiler.runtime.native.library import load
from nm_compiler.runtime.native.packing import pack as pack_weight
from nm_compiler.solvers.combinations import byte_table, pack
from nm_compiler.solvers.masks import masked as masked_weight
from nm_compiler.solvers.two_masks import two_masks

OPS = torch.ops.nm


def scored(in_axis: int = 1, by_position: bool = True) -> tuple[Any, ...]:
    shape = (8, 4, 3) if in_axis else (4, 8)
    weight = torch.randn(shape, requires_grad=True)
    live = torch.ones(8, 3 if in_axis else 1, 6, dtype=torch.bool)
    live[:4, :, 1:] = False
    scores = torch.rand(shape) if by_position else torch.rand(live.shape)
    table = byte_table(Pattern(2, 4)) if by_position else combination_table(Pattern(2, 4))
    kept = pack(live) if by_position else live.to(torch.uint8)
    rows = [0, 2, 1] if in_axis else [1, 0]
    return weight, scores.requires_grad_(), kept, table, 1, rows, by_position


def requires(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def packed(
    shape: tuple[int, ...], pattern: str = "2:4", conv_groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """values, codes, scales, bias, no residual, pattern and rows: what every packed product has."""
    at = Pattern.parse(pattern)
    given = pack_weight(masked_weight(torch.randn(shape), pattern=at, axis=1), at, conv_groups=conv_groups, dtype=dtype)
    return given.values, given.codes, given.scales, torch.randn(shape[0]), None, [at.n, at.m], shape[0]


def with_residual(operands: tuple[Any, ...], *shape: int) -> tuple[Any, ...]:
    return (*operands[:4], torch.randn(shape), *operands[5:])


SAMPLES: dict[str, list[Any]] = {
    "live_mask": [
        lambda: (pack(torch.rand(8, 3, 6) < 0.5), byte_table(Pattern(2, 4)), [8, 4, 3], [0, 2, 1]),
        lambda: ((torch.rand(8, 3, 6) < 0.5).to(torch.uint8), combination_table(Pattern(2, 4)), [8, 4, 3], [0, 2, 1]),
        lambda: (torch.ones(8, 1, 16, dtype=torch.uint8), torch.eye(16, dtype=torch.uint8), [16, 8], [1, 0]),
        lambda: (pack(torch.rand(4, 1, 5) < 0.5), byte_table(Pattern(1, 5)), [4, 5], [0, 1]),
    ],
    "unpack_mask": [lambda: (pack(torch.rand(8, 12) < 0.5), [8, 4, 3])],
    "score_weight": [scored, lambda: scored(0), lambda: scored(1, False), lambda: scored(0, False)],
    "score_weight_backward": [lambda: (torch.randn(8, 4, 3), *[t.detach() if isinstance(t, torch.Tensor) else t for t in
                                       (scored()[0], *scored()[2:])])],
    "masked_weight": [lambda: (requires(8, 4), torch.rand(8, 4) < 0.5)],
    "srste_weight": [lambda: (requires(8, 4, 3), 2, 4, 1, 2e-4), lambda: (requires(4, 8), 1, 4, 0, 0.0)],
    "backward_weight": [lambda: (torch.randn(8, 4, 3), torch.randperm(8), 2, 4, [0, 2, 1]),
                        lambda: (torch.randn(4, 8), torch.randperm(8), 1, 4, [1, 0]),
                        lambda: (torch.randn(3, 4, 8), torch.stack([torch.randperm(8) for _ in range(3)]), 2, 4, [0, 2, 1])],
    "backward_groups": [lambda: (torch.randn(8, 4, 3), 2, 4, 0), lambda: (torch.randn(3, 4, 8), 1, 4, 2)],
    "two_masks": [lambda: (requires(16, 8), torch.randperm(16), 2, 4, 2e-4), lambda: (requires(8, 16).detach().t().requires_grad_(), None, 1, 4, 0.0)],
    "linear": [
        lambda: (requires(2, 3, 4), requires(8, 4), torch.randn(8, 4), requires(8)),
        lambda: (requires(1, 4), requires(8, 4), torch.randn(8, 4), None),
        lambda: (requires(4), requires(8, 4), torch.randn(8, 4), None),
    ],
    "einsum": [
        lambda: (requires(2, 3, 4), requires(3, 8, 4), torch.randn(3, 8, 4), "bei,eoi->beo"),
        lambda: (requires(4, 5), requires(8, 4), torch.randn(8, 4), "it,oi->ot"),
        lambda: (requires(2, 1, 5, 4), requires(3, 4, 8), torch.randn(3, 4, 8), "beti,eio->beto"),
    ],
    "grouped_mm": [
        lambda: (requires(7, 4), requires(3, 4, 8), torch.randn(3, 4, 8), torch.tensor([2, 2, 6]), False),
        lambda: (requires(4, 4), requires(2, 8, 4).transpose(1, 2), torch.randn(2, 8, 4).transpose(1, 2), torch.tensor([1, 4]), True),
    ],
    "soft_weight": [
        lambda: (requires(8, 8, 3), torch.tensor(1.5), 2, 4, 1),
        lambda: (requires(8, 16).half().detach().requires_grad_(), torch.tensor(1.5).half(), 1, 16, 1),
    ],
    "grouped_mm_weight": [lambda: (torch.randn(7, 4), torch.randn(7, 8), torch.randn(3, 4, 8), torch.tensor([2, 2, 6]), False)],
    "no_gradient": [lambda: (torch.randn(3, 4), torch.randn(2), "Net"), lambda: (torch.randn(4, 3).t(), torch.randn(2), "Net")],
    "packed_linear": [
        lambda: (torch.randn(2, 3, 16), *packed((20, 16)), "gelu"),
        lambda: (torch.randn(40, 21).bfloat16(), *with_residual(packed((8, 21), "1:7", dtype=torch.int8), 40, 8), "relu"),
    ],
    "packed_conv2d": [
        lambda: (torch.randn(2, 16, 6, 5), *packed((12, 8, 3, 2), conv_groups=2), [3, 2], [2, 1], [1, 0], [1, 2], 2, "silu"),
        lambda: (torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), *packed((4, 8, 1, 1), "3:8", dtype=torch.bfloat16), [1, 1], [1, 1], [0, 0], [1, 1], 1, ""),
    ],
    "conv": [
        lambda: (requires(2, 4, 6, 5), requires(8, 4, 3, 1), torch.randn(8, 4, 3, 1), requires(8), [2, 1], [1, 0], [1, 2], 1),
        lambda: (requires(1, 8, 7), requires(8, 4, 3), torch.randn(8, 4, 3), None, [1], [2], [2], 2),
        lambda: (requires(1, 4, 3, 3, 3), requires(4, 4, 1, 2, 1), torch.randn(4, 4, 1, 2, 1), None, [1] * 3, [0] * 3, [1] * 3, 1),
    ],
}  # fmt: skip


@pytest.mark.ci(
    here=["live_mask", "score_weight-0", "srste", "backward_weight-0", "two_masks-0", "linear-0", "packed", "grouped_mm-0"]
)
@pytest.mark.parametrize(("name", "index"), [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))])
def test_the_op_passes_opcheck(name: str, index: int) -> None:
    if name.startswith("packed") and isinstance(load(), str):
        pytest.skip(f"no CPU kernels here: {load()}")
    torch.library.opcheck(getattr(OPS, name).default, SAMPLES[name][index]())


ELSEWHERE = {  # they need the stand-in for their library
    "cslt_linear": "test_cusparselt.py", "unfold_taps": "test_cusparselt.py", "cslt_linear_int8": "test_int8.py", "cslt_train_linear": "test_train_cusparselt.py", "cslt_input_grad": "test_train_cusparselt.py",
}  # fmt: skip


def laid_out(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values, with ``order`` as the order of axes in memory."""
    inverse = sorted(range(tensor.ndim), key=order.__getitem__)
    return tensor.detach().permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("name", [str(op).split(".")[1] for op in (*MASKED, *BACKWARD)] + ["score_weight_backward"])
def test_an_op_on_weights_computes_the_same_and_keeps_its_strides_however_its_arguments_lie(name: str) -> None:
    """torch.compile hands them over as their neighbours left them: the ops are tagged for it."""
    op = getattr(OPS, name).default
    assert torch.Tag.flexible_layout in op.tags
    for sample in SAMPLES[name]:
        args = sample()
        expected = op(*args)
        for order in itertools.permutations(range(args[0].ndim)):
            moved = [laid_out(a, order) if isinstance(a, torch.Tensor) and a.shape == args[0].shape else a for a in args]
            if name == "score_weight_backward":
                moved[0] = args[0]  # the gradient comes from elsewhere
            found = op(*moved)
            with FakeTensorMode() as mode:
                fake = op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in moved])
            for one, other, told in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected, fake)), strict=True):
                assert torch.equal(one, other)
                assert one.stride() == told.stride()


def graphs_of(sparse: nm.SparseModule, x: torch.Tensor) -> list[str]:
    """What a compiler gets to see: the ops of the forward and of the backward graph."""
    seen: list[str] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(" ".join(str(node.target) for node in gm.graph.nodes))
        return make_boxed_func(gm.forward)

    fast = torch.compile(sparse, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    fast(x).square().sum().backward()
    return seen


@pytest.mark.parametrize("method", [nm.BiMask(), nm.LBC(), nm.Magnitude()], ids=lambda method: method.name)
def test_a_compiler_sees_torchs_own_products_and_selections_and_our_gradients(method: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 2))
    x = torch.randn(2, 3, 6, 6)
    sparse = nm.compile(model, x, method=method)
    forward, backward = graphs_of(sparse, x)
    assert forward.count("aten.convolution.default") == 2
    assert forward.count("aten.addmm.default") == 2
    for name in ("nm.conv", "nm.linear", "nm.score_weight", "nm.masked_weight"):
        assert name not in forward
    own = {"BiMask": "nm.backward_weight", "LBC": "nm.score_weight_backward", "Magnitude": "nm.unpack_mask"}[method.name]
    assert (forward + backward).count(own) == 2
    assert backward.count("aten.convolution_backward") == 2


def test_every_registered_op_is_checked() -> None:
    for name in ("op", "unfold", "int8", "training"):  # they register their ops, whichever tests ran before
        importlib.import_module(f"nm_compiler.runtime.cusparselt.{name}")
    registered = {
        str(schema.name).removeprefix("nm::") for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("nm::")
    }
    assert registered == set(SAMPLES) | set(ELSEWHERE)
    assert registered > set(_OF_LOWERED)
    for name, file in ELSEWHERE.items():
        assert f"opcheck(torch.ops.nm.{name}" in (Path(__file__).parent / file).read_text()


METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(), nm.SRSTE(), nm.Magnitude()]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)
every_method = pytest.mark.parametrize("method", [*METHODS, nm.SSTE(), nm.Gradual(), nm.LBCBiMask()], ids=str)


@each_method
def test_grouped_dilated_strided_convolutions_of_non_square_images_work_at_batch_one(method: Any) -> None:
    model = Grouped()
    dense = copy.deepcopy(model)
    sparse = nm.compile(model, example(model), method=method)
    assert {site.name for site in sparse.plan.sites} == {"grouped.weight", "dilated.weight", "narrow.weight"}
    x = example(model, batch=1).requires_grad_()
    sparse(x).square().sum().backward()
    assert x.grad is not None
    if isinstance(method, nm.LBC):  # all combinations live: nothing is masked yet
        y = x.detach().clone().requires_grad_()
        dense(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    for weight in sparse.weights:
        assert weight.param.grad is not None
        assert bool(weight.param.grad.isfinite().all())


@every_method
def test_float64_and_channels_last_give_the_same_numbers_as_float32_contiguous(method: Any) -> None:
    model = Grouped()
    sparse = nm.compile(model, example(model), method=method)
    x = example(model, batch=3)
    expected = sparse(x)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in sparse.named_parameters() if p.grad is not None}
    for change in ({"memory_format": torch.channels_last}, {"dtype": torch.float64}):
        twin = copy.deepcopy(sparse).to(**change)
        twin.zero_grad()
        out = twin(x.to(**change))
        torch.testing.assert_close(out.float(), expected, rtol=2e-5, atol=2e-6)
        out.square().sum().backward()
        for name, parameter in twin.named_parameters():
            if name in grads:
                torch.testing.assert_close(parameter.grad.float(), grads[name], rtol=2e-4, atol=2e-6)


@every_method
def test_a_masked_weight_lies_in_memory_as_the_weight_does(method: Any) -> None:
    """torch.compile counts on it, and a convolution would copy a weight that lies otherwise."""
    model = Grouped().to(memory_format=torch.channels_last)
    sparse = nm.compile(model, example(model).to(memory_format=torch.channels_last), method=method)
    for weight in sparse.weights:
        for masked in sparse.masked(weight.site.name):
            assert masked is None or masked.stride() == weight.param.stride()


@every_method
def test_autocast_to_bfloat16_casts_the_products_and_keeps_the_masters_in_float32(method: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 8))
    sparse = nm.compile(model, torch.randn(2, 8), method=method)
    x = torch.randn(32, 8)
    exact = sparse(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.02)
    for name, parameter in sparse.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32, name


@each_method
def test_what_addmm_adds_need_not_be_a_bias_and_images_need_no_batch(method: Any) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding="same")
            self.row, self.head = nn.Parameter(torch.randn(8, 8) / 3), nn.Linear(8, 2)
            self.single = nn.Parameter(torch.randn(1, 8))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.conv(self.stem(image)).flatten(1).T
            x = torch.addmm(x, x, self.row)
            return self.head(torch.addmm(self.single, x, self.row))

    model, image = Residual(), torch.randn(3, 6, 6)
    sparse = nm.compile(model, image, method=method)
    assert {site.name for site in sparse.plan.sites} == {"conv.weight", "row"}
    sparse(image).square().sum().backward()
    expected = sparse(image)
    torch.testing.assert_close(
        nm.freeze(sparse, finish=True)(image), expected if not isinstance(method, nm.LBC) else model(image)
    )


def test_autocast_to_float16_casts_the_two_weight_products_as_it_casts_torchs_own() -> None:
    x, w, backward = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 8)
    with torch.autocast("cpu", torch.float16):
        assert OPS.linear(x, w, backward, None).dtype == torch.nn.functional.linear(x, w).dtype == torch.float16


def test_an_order_has_no_say_in_the_output() -> None:
    model = Grouped()
    sparse = nm.compile(model, example(model), method=nm.BiMask())
    x = example(model)
    before = sparse(x)
    for weight in sparse.weights:
        if weight.site.backward_groups:
            block = weight.site.out // weight.site.conv_groups
            weight["order"].copy_(torch.arange(weight.site.out).view(-1, block).flip(1).flatten())
    assert torch.equal(sparse(x), before)


class Restated(torch.autograd.Function):
    """x W_f^T, whose gradient of x is g W_b."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, backward)
        return x @ forward.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, backward = ctx.saved_tensors
        return grad @ backward, grad.T @ x, None


@pytest.mark.parametrize(("live", "fold"), [(False, False), (False, True), (True, False)], ids=["captured", "folded", "live"])
def test_a_penalty_on_input_gradients_goes_straight_through_both_masks(live: bool, fold: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    method, then = nm.BiMask(decay=0, fold=fold), "eager" if live else None
    sparse = nm.compile(model, None if live else x, method=method, include=["*"], then=then)

    def slope(y: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return gradient.square().sum()

    def restated(layer: nn.Linear, data: torch.Tensor) -> torch.Tensor:
        order = layer.weight_order if hasattr(layer, "weight_order") else torch.arange(layer.out_features)
        forward, turned = two_masks(layer.weight.detach(), order, 2, 4)
        straight = layer.weight - layer.weight.detach()
        return Restated.apply(data, forward + straight, turned.T[order.argsort()] + straight) + layer.bias

    first, _, second, _, third = model
    weights = [layer.weight for layer in (first, second, third)]
    found = torch.autograd.grad(slope(sparse(x)), weights)
    hidden = restated(second, restated(first, x).tanh()).tanh()
    for mine, expected in zip(found, torch.autograd.grad(slope(restated(third, hidden)), weights), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@every_method
def test_torch_func_takes_the_gradients_of_a_backward_pass_at_every_level(method: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    sparse = nm.compile(model, x, method=method)
    parameters = dict(sparse.named_parameters())

    def loss(given: dict[str, torch.Tensor], data: torch.Tensor = x) -> torch.Tensor:
        return torch.func.functional_call(sparse, given, (data,)).square().sum()

    def slope(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(grad.square().sum() for grad in torch.func.grad(loss)(given).values())

    expected = torch.autograd.grad(sparse(x).square().sum(), list(parameters.values()), create_graph=True)
    for name, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(parameters)[name], grad)
    twice = torch.autograd.grad(sum(grad.square().sum() for grad in expected), list(parameters.values()))
    for name, grad in zip(parameters, twice, strict=True):
        torch.testing.assert_close(torch.func.grad(slope)(parameters)[name], grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_method
def test_gradients_of_each_example_by_vmap_are_those_of_the_examples_alone(method: Any) -> None:
    sparse = nm.compile(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).double(), torch.randn(2, 8).double(), method=method
    )
    parameters, x = dict(sparse.named_parameters()), torch.randn(4, 8).double()

    def loss(given: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(sparse, given, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, one in enumerate(x):
        for name, grad in torch.func.grad(loss)(parameters, one).items():
            torch.testing.assert_close(each[name][index], grad)


@every_method
def test_forward_mode_is_an_error_and_drops_no_tangent_in_silence(method: Any) -> None:
    sparse = nm.compile(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(2, 8), method=method)
    parameters = {name: p.detach() for name, p in sparse.named_parameters()}

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(sparse, given, (torch.ones(2, 8),)).sum()

    with pytest.raises(nm.NMError, match=r"on \[8, 8\] has no forward-mode gradient .*nm.freeze the model first"):
        torch.func.jvp(loss, (parameters,), ({name: torch.ones_like(p) for name, p in parameters.items()},))


@pytest.mark.parametrize("by_position", [True, False])
def test_the_gradients_of_scores_have_gradients(by_position: bool) -> None:
    weight, scores, *rest = scored(by_position=by_position)
    weight, scores = (each.detach().double().requires_grad_() for each in (weight, scores))
    grad = torch.randn_like(weight).requires_grad_()

    def gradients(weight: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(OPS.score_weight(weight, scores, *rest), (weight, scores), grad, create_graph=True)

    plain = OPS.score_weight_backward(grad.detach(), weight.detach(), *rest)
    for once, found in zip(plain, gradients(weight, grad), strict=True):
        torch.testing.assert_close(found, once)
    assert torch.autograd.gradcheck(gradients, (weight, grad))


def test_an_op_of_ones_own_may_have_defaults_and_may_be_defined_again() -> None:
    for factor in (2.0, 3.0):

        @weight_op("mine::scaled_again", gradient=lambda g, weight, scaled, by: g * by)
        def scaled_again(weight: torch.Tensor, by: float = factor) -> torch.Tensor:
            return weight * by

        weight = torch.ones(4, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(scaled_again(weight).sum(), weight)
        assert scaled_again(weight).eq(factor).all()
        assert grad.eq(factor).all()


@pytest.mark.parametrize("op", ["srste_weight", "two_masks"])
def test_the_gradient_of_the_pull_on_pruned_weights_is_that_of_the_pruned_weights(op: str) -> None:
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    given, along = torch.randn(2, 8, 8, dtype=torch.float64)
    masked = OPS.srste_weight(weight, 2, 4, 1, 0.1) if op == "srste_weight" else OPS.two_masks(weight, None, 2, 4, 0.1)[0]
    (grad,) = torch.autograd.grad(masked, weight, given, create_graph=True)
    (twice,) = torch.autograd.grad(grad, weight, along)
    pruned = (masked == 0).detach()
    torch.testing.assert_close(grad, given + 0.1 * pruned * weight)
    torch.testing.assert_close(twice, 0.1 * pruned * along)
