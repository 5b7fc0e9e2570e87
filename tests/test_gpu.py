"""What has to hold on an NVIDIA GPU as on the CPU. `make gpu` runs these on a machine that has one."""

from __future__ import annotations

import copy
import os
import threading
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from triton_steps import FLOATS, same, steps
from triton_steps import LAYOUTS as LYING

import nm_compiler as nm
from nm_compiler.capture.export import capture_mode
from nm_compiler.graph import tidy
from nm_compiler.passes.lower_cusparselt import lower_cusparselt
from nm_compiler.pattern import Pattern, PatternMap
from nm_compiler.runtime.cusparselt.candidates import candidates
from nm_compiler.runtime.cusparselt.compress import writes_as_library
from nm_compiler.runtime.cusparselt.direct import Direct, binding
from nm_compiler.runtime.cusparselt.int8 import cslt_linear_int8, pack_int8
from nm_compiler.runtime.cusparselt.library import KNOWN
from nm_compiler.runtime.cusparselt.op import cslt_linear, operand
from nm_compiler.runtime.cusparselt.packing import pack
from nm_compiler.runtime.cusparselt.search import search
from nm_compiler.sites.plan import find
from nm_compiler.solvers import masks, order_launch
from nm_compiler.solvers.backward_order import (
    assignment_search,
    exchange_search,
    kept_importance,
    quick_search,
    search_all,
)
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.solvers.masks import masked, top_mask
from nm_compiler.solvers.order_launch import Problem
from nm_compiler.solvers.transposable import transposable_mask
from nm_compiler.solvers.two_masks import two_masks

os.environ.setdefault("NM_COMPILER_CUSPARSELT", "direct")  # what needs a GPU to be tried; set it to "torch" for torch's calls

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


# one search for both devices: the quick one takes another on a GPU, whose sums a near tie can turn
ALIKE = [nm.BiMask(search=assignment_search) if isinstance(method, nm.BiMask) else method for method in METHODS]


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("method", ALIKE, ids=NAMES)
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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LYING)
def test_every_op_of_training_gives_on_the_gpu_what_it_gives_on_the_cpu(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for text in ("2:4", "1:4", "4:8", "1:16", "3:5"):
        for step in steps(text, dtype, layout, strange=True):
            there = [given.cuda() if isinstance(given, Tensor) else given for given in step.arguments]
            with torch.no_grad():
                wanted, found = step.call(*step.arguments), step.call(*there)
            found = tuple(each.cpu() for each in found) if isinstance(found, tuple) else found.cpu()
            assert same(found, wanted, computed=step.computed), step.name


@pytest.mark.parametrize("layout", ["linear", "channels_last"])
def test_every_op_of_training_is_one_launch(layout: str) -> None:
    pytest.importorskip("triton")
    for step in steps("2:4", torch.bfloat16, layout, strange=False):
        there = [given.cuda() if isinstance(given, Tensor) else given for given in step.arguments]
        with torch.no_grad():
            step.call(*there)  # compiles
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                step.call(*there)
                torch.cuda.synchronize()
        launched = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
        assert len(launched) == 1, (step.name, launched)


def test_a_backward_order_is_searched_where_the_importance_lies() -> None:
    importance = torch.rand(128, 64, generator=torch.Generator().manual_seed(0))
    start = torch.arange(128)
    there = importance.cuda()
    found = quick_search(there, start.cuda(), 2, 4, moves=2000, seed=1)
    assert found.is_cuda
    assert torch.equal(found.cpu().sort().values, start)
    assert torch.equal(found, exchange_search(there, start.cuda(), 2, 4, moves=2000, seed=1))
    before, here = (float(kept_importance(importance, order, 2, 4)) for order in (start, found.cpu()))
    wanted = float(kept_importance(importance, exchange_search(importance, start, 2, 4, moves=2000, seed=1), 2, 4))
    assert here - before >= 0.9 * (wanted - before) > 0


def ordered(rows: int, columns: int, n: int, m: int, seed: int) -> Problem:
    """On the GPU, correlated: rows and columns of different size."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    for shape in ((rows, 1), (1, columns)):
        weight = weight * torch.exp(0.7 * torch.randn(shape, generator=draw))
    importance = weight.abs() * magnitude_mask(weight, n, m, 1)
    return Problem(importance.cuda(), torch.randperm(rows, generator=draw).cuda(), n, m, seed)


def gained(problem: Problem, order: Tensor) -> float:
    """What an order keeps beyond the better start; the order is checked to be a permutation no worse than both."""
    identity = torch.arange(len(order), device="cuda")
    assert torch.equal(order.sort().values, identity)
    kept, *starts = (
        float(kept_importance(problem.importance, each, problem.n, problem.m)) for each in (order, problem.order, identity)
    )
    assert kept >= max(starts) * (1 - 1e-12)
    return kept - max(starts)


SOME = [(64, 96, 2, 4), (128, 288, 2, 4), (128, 96, 1, 16), (520, 64, 2, 4), (512, 96, 4, 8), (192, 48, 2, 3)]


def test_orders_of_many_weights_searched_in_few_launches_keep_what_torch_operations_keep(monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    problems = [ordered(*sizes, seed) for sizes in SOME for seed in range(3)]
    together = search_all(exchange_search, problems, moves=2000)
    again = search_all(exchange_search, problems[::-1], moves=2000)[::-1]
    monkeypatch.setattr(order_launch, "_LONG", 0)
    in_rounds = search_all(exchange_search, problems, moves=2000)
    monkeypatch.setattr(masks, "on_gpu", lambda _: False)
    plain = search_all(exchange_search, problems, moves=2000)
    for one, other in zip(together, again, strict=True):
        assert torch.equal(one, other)
    for at in range(0, len(problems), 3):
        sums = [
            sum(gained(*each) for each in zip(problems[at : at + 3], found[at : at + 3], strict=True))
            for found in (together, in_rounds, plain)
        ]
        assert min(sums[:2]) >= 0.97 * sums[2] > 0, (SOME[at // 3], sums)


def test_the_host_does_not_wait_for_a_search() -> None:
    pytest.importorskip("triton")
    problems = [ordered(64, 96, 2, 4, seed) for seed in range(2)]
    search_all(exchange_search, problems, moves=500)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = search_all(exchange_search, problems, moves=500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert min(gained(*each) for each in zip(problems, found, strict=True)) > 0


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_what_cannot_be_searched_on_the_gpu_keeps_one_of_its_starts(value: float) -> None:
    order = torch.randperm(16, device="cuda")
    importance = torch.full((16, 4), value, device="cuda")
    assert torch.equal(exchange_search(importance, order, 2, 4, moves=100, seed=0), order)


def test_an_order_is_searched_in_place() -> None:
    torch.manual_seed(0)
    model, x = MLP(32).cuda(), torch.randn(16, 8, device="cuda")
    sparse = nm.compile(model, (x,), method=nm.BiMask())
    orders = [weight["order"] for weight in sparse.weights if weight.site.backward_groups]
    addresses = [order.data_ptr() for order in orders]
    nm.SparsityScheduler(sparse, total_steps=1).step()
    assert [weight["order"].data_ptr() for weight in sparse.weights if weight.site.backward_groups] == addresses
    assert any(not torch.equal(order, torch.arange(len(order), device="cuda")) for order in orders)


def test_a_transposable_mask_stays_on_its_device() -> None:
    importance = torch.rand(16, 16)
    found = transposable_mask(importance.cuda(), pattern="2:4")
    assert found.is_cuda
    assert torch.equal(found.cpu(), transposable_mask(importance, pattern="2:4"))


def learn_in_half(sparse: nm.SparseModule, x: Tensor, y: Tensor) -> None:
    """Thirty steps under autocast, after which the loss is lower."""
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


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_bf16_autocast_trains_and_stays_n_of_m(method: Any) -> None:
    torch.manual_seed(0)
    model, x, y = ConvNet(16).cuda(), torch.randn(32, 3, 8, 8, device="cuda"), torch.randint(4, (32,), device="cuda")
    sparse = nm.compile(model, (x,), method=method)
    learn_in_half(sparse, x, y)
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


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
LAYOUTS = pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
SPARSE = pytest.mark.skipif(not torch.backends.cusparselt.is_available(), reason="this torch was built without cuSPARSELt")


def sparse(out: int, inputs: int, dtype: torch.dtype, pattern: str = "2:4") -> Tensor:
    return masked(torch.randn(out, inputs, device="cuda") / inputs**0.5, pattern=pattern).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Relative to the size of the values: sums are taken in another order."""
    assert found.shape == wanted.shape
    difference = (found.double() - wanted.double()).abs().max()
    assert difference <= 4 * torch.finfo(found.dtype).eps * wanted.double().abs().max(), float(difference)


@SPARSE
@HALVES
@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 7, 8, 100, 1024, 1031])
@pytest.mark.parametrize(("out", "inputs"), [(256, 128), (128, 512), (48, 80), (64, 32), (64, 288)])
def test_packed_products_are_those_of_the_masked_weight(
    dtype: torch.dtype, rows: bool, tokens: int, out: int, inputs: int
) -> None:
    weight, x = sparse(out, inputs, dtype), torch.randn(tokens, inputs, device="cuda", dtype=dtype)
    packed, bias = pack(weight), torch.randn(out, device="cuda", dtype=dtype)
    for b in (None, bias):
        wanted = functional.linear(x.double(), weight.double(), None if b is None else b.double())
        y = cslt_linear(x, packed, b, out, inputs, 0, rows)
        close(y, wanted)
        assert y.stride() == ((out, 1) if rows else (1, -(-tokens // 8) * 8))
        close(cslt_linear(x.t().contiguous().t(), packed, b, out, inputs, 0, rows), wanted)
        close(cslt_linear(torch.cat([x, x], 1)[:, :inputs], packed, b, out, inputs, 0, rows), wanted)
        close(cslt_linear(functional.pad(x.flatten(), (1, 0))[1:].view_as(x), packed, b, out, inputs, 0, rows), wanted)


@SPARSE
@HALVES
@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:16"])
def test_groups_with_fewer_than_two_non_zeros_are_packed_right(dtype: torch.dtype, pattern: str) -> None:
    weight, x = sparse(128, 256, dtype, pattern), torch.randn(64, 256, device="cuda", dtype=dtype)
    packed = pack(weight)
    assert packed.shape == (128, 144)
    close(cslt_linear(x, packed, None, 128, 256, 0, False), functional.linear(x.double(), weight.double()))


@SPARSE
@LAYOUTS
def test_a_packed_product_is_captured_in_a_cuda_graph_and_reads_new_inputs(rows: bool) -> None:
    weight, bias = sparse(256, 128, torch.bfloat16), torch.randn(256, device="cuda", dtype=torch.bfloat16)
    packed, x = pack(weight), torch.randn(101, 128, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cslt_linear(x, packed, bias, 256, 128, 0, rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cslt_linear(x, packed, bias, 256, 128, 0, rows)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        close(y, functional.linear(x.double(), weight.double(), bias.double()))


@SPARSE
def test_the_library_is_called_directly_where_its_version_is_known() -> None:
    asked = os.environ["NM_COMPILER_CUSPARSELT"] == "direct"
    found = binding(torch.device("cuda"))
    assert (found is not None) is (asked and torch.backends.cusparselt.version() in KNOWN)


DIRECT = pytest.mark.skipif(
    not torch.cuda.is_available() or binding(torch.device("cuda")) is None, reason="needs a cuSPARSELt that is called directly"
)


@DIRECT
@HALVES
@LAYOUTS
@pytest.mark.parametrize(
    ("out", "inputs", "tokens"), [(16, 16, 8), (16, 32, 9), (48, 80, 13), (64, 288, 45), (304, 1040, 333), (4096, 512, 1024)]
)
def test_direct_products_are_the_dense_ones_with_and_without_relu(
    dtype: torch.dtype, rows: bool, out: int, inputs: int, tokens: int
) -> None:
    direct = Direct(binding(torch.device("cuda"))._library)  # type: ignore[union-attr]
    weight, x = sparse(out, inputs, dtype), torch.randn(tokens, inputs, device="cuda", dtype=dtype)
    packed, bias = pack(weight), torch.randn(out, device="cuda", dtype=dtype)
    for given in (x, x.t().contiguous().t()):
        for b in (None, bias):
            for activation in ("", "relu"):
                y = direct.product(packed, operand(given), b, out, rows=rows, activation=activation)
                assert y is not None
                wanted = functional.linear(x.double(), weight.double(), None if b is None else b.double())
                close((y if rows else y.t())[:tokens], wanted.relu() if activation else wanted)
    direct.plans.close()


@DIRECT
@LAYOUTS
def test_a_product_with_relu_is_captured_and_bias_and_input_are_read_anew(rows: bool) -> None:
    weight, bias = sparse(256, 128, torch.bfloat16), torch.randn(256, device="cuda", dtype=torch.bfloat16)
    packed, x = pack(weight), torch.randn(104, 128, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cslt_linear(x, packed, bias, 256, 128, 0, rows, "relu")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cslt_linear(x, packed, bias, 256, 128, 0, rows, "relu")
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        bias.copy_(torch.randn_like(bias))
        graph.replay()
        close(y, functional.linear(x.double(), weight.double(), bias.double()).relu())


@DIRECT
def test_threads_multiply_with_plans_of_their_own_and_destroyed_plans_are_made_again() -> None:
    direct, errors = Direct(binding(torch.device("cuda"))._library, most=2), list[str]()  # type: ignore[union-attr]

    def work() -> None:
        try:
            for number in range(12):
                inputs = 64 * (1 + number % 4)
                weight, x = sparse(128, inputs, torch.half), torch.randn(64, inputs, device="cuda").half()
                y = direct.product(pack(weight), operand(x), None, 128, rows=True)
                assert y is not None
                close(y, functional.linear(x.double(), weight.double()))
        except Exception as error:  # of a thread, which pytest does not see
            errors.append(repr(error))

    for _ in range(2):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert errors == []


@DIRECT
def test_a_relu_that_is_lowered_with_its_product_computes_the_same_compiled_and_not() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU()).cuda().half().eval()
    x = torch.randn(40, 64, device="cuda").half()
    gm, _ = capture_mode(model, (x,), {}, training=False)
    sites = {site.name: site for site in find(model, [gm], PatternMap.parse("2:4"), include=["*"]).sites}
    with torch.no_grad():
        for name in sites:
            model.get_parameter(name).copy_(masked(model.get_parameter(name), pattern="2:4", axis=1))
        gm = lower_cusparselt(gm, sites_by_read=sites, min_tokens=0)
        tidy(gm)
        assert not any(node.target is torch.ops.aten.relu.default for node in gm.graph.nodes)
        torch.testing.assert_close(gm(x)[0], model(x), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(torch.compile(gm, fullgraph=True)(x)[0], model(x), rtol=2e-2, atol=2e-2)


@SPARSE
@LAYOUTS
def test_the_searched_algorithm_computes_the_same(rows: bool) -> None:
    weight, x = sparse(512, 512, torch.bfloat16), torch.randn(2048, 512, device="cuda", dtype=torch.bfloat16)
    packed, bias = pack(weight), torch.randn(512, device="cuda", dtype=torch.bfloat16)
    algorithm = search(weight, packed, x, bias, rows=rows)
    wanted = functional.linear(x.double(), weight.double(), bias.double())
    close(cslt_linear(x, packed, bias, 512, 512, algorithm, rows), wanted)


@SPARSE
@HALVES
@pytest.mark.parametrize("searched", [False, True], ids=["default", "searched"])
def test_lowered_graphs_compute_what_the_frozen_models_do_eager_and_compiled_whole(dtype: torch.dtype, searched: bool) -> None:
    models = (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)), (9, 5, 64)), (
        nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1, bias=False), nn.Flatten()), (3, 32, 6, 7)
    )  # fmt: skip
    for made, shape in models:
        model, x = made.cuda().to(dtype).eval(), torch.randn(shape, device="cuda", dtype=dtype)
        gm, _ = capture_mode(model, (x,), {}, training=False)
        sites = {site.name: site for site in find(model, [gm], PatternMap.parse("2:4"), include=["*"]).sites}
        with torch.no_grad():
            for name in sites:
                model.get_parameter(name).copy_(masked(model.get_parameter(name), pattern="2:4", axis=1))
            assert all(not each.reasons for each in candidates(gm, sites, min_tokens=0))
            gm = lower_cusparselt(gm, sites_by_read=sites, min_tokens=0, search=searched)
            tidy(gm)
            assert sum(node.target is torch.ops.nm.cslt_linear.default for node in gm.graph.nodes) == 2
            compiled = torch.compile(gm, fullgraph=True)
            for batch in (shape[0], 4):
                x = torch.randn(batch, *shape[1:], device="cuda", dtype=dtype)
                wanted = copy.deepcopy(model).double()(x.double())
                torch.testing.assert_close(gm(x)[0].double(), wanted, rtol=5e-2, atol=5e-2)
                torch.testing.assert_close(compiled(x)[0].double(), wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("text", ["2:4", "1:4", "1:2", "2:8", "1:16", "3:4"])
def test_both_masks_and_the_transpose_are_those_of_the_cpu_to_the_bit(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    for out, inputs in ((16, 16), (80, 48), (1024, 4112)):
        for weight in (torch.randn(out, inputs).to(dtype), torch.randint(-3, 4, (out, inputs)).to(dtype)):
            for order in (None, torch.randperm(out)):
                wanted = two_masks(weight, order, pattern.n, pattern.m)
                found = two_masks(weight.cuda(), None if order is None else order.cuda(), pattern.n, pattern.m)
                for ours, right in zip(found, wanted, strict=True):
                    assert ours.is_contiguous()
                    assert torch.equal(ours.cpu().view(torch.uint8), right.view(torch.uint8))


@SPARSE
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("fold", [False, True], ids=["ordered", "folded"])
def test_bimask_on_packed_weights_computes_what_it_does_on_masked_ones(how: str, fold: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)).cuda().half()
    x, results = torch.randn(40, 8, 64, device="cuda").half(), []
    for method in (nm.BiMask(fold=fold), nm.BiMask(fold=fold, products="cusparselt", min_tokens=1)):
        sparse = nm.compile(copy.deepcopy(model), (x,), method=method, include=["*"]).train()
        for name, buffer in sparse.named_buffers():
            if name.endswith("_order"):
                buffer.copy_(torch.randperm(len(buffer), generator=torch.Generator().manual_seed(1)))
        run = torch.compile(sparse, fullgraph=True) if how == "compiled" else sparse
        given = x.clone().requires_grad_()
        y = run(given)
        (y.float() * torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)).sum().backward()
        results.append({"y": y.detach(), "x": given.grad, **{name: p.grad for name, p in sparse.named_parameters()}})
    for name, wanted in results[0].items():
        found = results[1][name]
        assert float((found.float() - wanted.float()).norm()) <= 0.02 * float(wanted.float().norm()), name


@SPARSE
def test_bimask_on_packed_weights_trains_under_autocast_and_freezes_to_2_of_4() -> None:
    torch.manual_seed(0)
    model, x, y = MLP(64).cuda(), torch.randn(64, 8, device="cuda"), torch.randint(4, (64,), device="cuda")
    sparse = nm.compile(model, (x,), method=nm.BiMask(products="cusparselt", min_tokens=1, interval=10))
    learn_in_half(sparse, x, y)
    assert "cuSPARSELt products from 1 tokens on" in str(nm.report(sparse))
    assert nm.verify(nm.freeze(sparse), "2:4").satisfied


@SPARSE
@HALVES
@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 16, 100, 1031])
def test_products_in_8_bits_are_those_of_the_rounded_operands(dtype: torch.dtype, rows: bool, tokens: int) -> None:
    weight, x = sparse(256, 128, dtype), torch.randn(tokens, 128, device="cuda", dtype=dtype)
    (packed, scale), bias = pack_int8(weight), torch.randn(256, device="cuda", dtype=dtype)
    whole = (weight.double() / scale.double()[:, None]).round() * scale.double()[:, None]
    step = x.double().abs().max() / 127
    wanted = functional.linear((x.double() / step).round() * step, whole, bias.double())
    found = cslt_linear_int8(x, packed, scale, bias, 128, rows)
    assert float((found.double() - wanted).norm()) <= 1e-2 * float(wanted.norm())


@SPARSE
def test_unfolded_convolutions_are_the_convolutions() -> None:
    for form in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 32, 3, padding="same")).cuda().half().eval()
        model.to(memory_format=form)  # type: ignore[call-overload]
        x = torch.randn(3, 32, 9, 8, device="cuda").half().contiguous(memory_format=form)
        gm, _ = capture_mode(model, (x,), {}, training=False)
        sites = {site.name: site for site in find(model, [gm], PatternMap.parse("2:4"), include=["*"]).sites}
        with torch.no_grad():
            for name in sites:
                model.get_parameter(name).copy_(masked(model.get_parameter(name), pattern="2:4", axis=1))
            gm = lower_cusparselt(gm, sites_by_read=sites, min_tokens=0, unfold=True)
            tidy(gm)
            assert sum(node.target is torch.ops.nm.unfold_taps.default for node in gm.graph.nodes) == 2
            torch.testing.assert_close(gm(x)[0], model(x), rtol=2e-2, atol=2e-2)


@SPARSE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_are_packed_byte_by_byte_as_the_library_does(dtype: torch.dtype) -> None:
    pack_triton = pytest.importorskip("nm_compiler.runtime.cusparselt.pack_triton")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the layout was read off a Hopper GPU")
    for out, inputs in ((64, 64), (192, 320), (512, 1024)):
        weight, order = torch.randn(out, inputs, device="cuda").to(dtype), torch.randperm(out, device="cuda")
        forward, turned = two_masks(weight, order, 2, 4)
        for given in (forward, turned):
            ours, theirs = pack_triton.packed(given), torch._cslt_compress(given)
            assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))  # bits: places may be NaN
        assert writes_as_library(forward)
