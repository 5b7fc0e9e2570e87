# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Mask ops of many weights as one call: the values, gradients and errors of one call each, to the bit."""

import copy
import gc
import itertools
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet, Grouped, Matmuls, dense, example
from ranks import run_two
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nm_compiler as nm
from nm_compiler.capture.records import pack, unpack
from nm_compiler.graph import run, show_graph
from nm_compiler.ops import together as ops
from nm_compiler.passes.gather_masks import gather_masks
from nm_compiler.solvers import combinations

METHODS = {
    "LBC": nm.LBC,
    "LBC-combination": lambda: nm.LBC(scores="combination"),
    "SRSTE": nm.SRSTE,
    "SRSTE-decoupled": lambda: nm.SRSTE(decoupled=True),
    "Magnitude": nm.Magnitude,
    "BiMask": lambda: nm.BiMask(interval=2, moves=20),
    "BiMask-fold": lambda: nm.BiMask(fold=True),
    "LBCBiMask": lambda: nm.LBCBiMask(backward=nm.BiMask(interval=2, moves=20)),
    "Gradual": nm.Gradual,
    "SSTE": nm.SSTE,
    "Transposable": nm.Transposable,
}
MODELS = {"MLP": MLP, "ConvNet": ConvNet, "Attention": Attention, "Matmuls": Matmuls, "Grouped": Grouped}


def single(sparse: nm.SparseModule, data: Tensor) -> Any:
    """One call as it was captured: an op for each weight."""
    return sparse.routes[sparse.training]((data,), {})


def compiled(model: type[nn.Module], method: Any, **options: Any) -> tuple[nm.SparseModule, Tensor]:
    torch.manual_seed(0)
    origin = model()
    data = example(origin)
    return nm.compile(origin, (data,), method=method(), include=["*"], **options), data


def steps(sparse: nm.SparseModule, data: Tensor, forward: Any, count: int = 5) -> list[Tensor]:
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse, weight_decay=1e-3), lr=0.05, momentum=0.9)
    scheduler = nm.SparsityScheduler(sparse, total_steps=count, optimizer=optimizer)
    seen = []
    for _ in range(count):
        loss = forward(sparse, data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in sparse.parameters() if p.grad is not None)]
        optimizer.step()
        scheduler.step()
    return [*seen, *(value.clone() for value in sparse.state_dict().values())]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def chain(count: int = 6, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def pair(method: Any = nm.LBC, **options: Any) -> tuple[nm.SparseModule, nm.SparseModule, Tensor]:
    """Two alike."""
    data = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    sparse = nm.compile(chain(), (data,), method=method(), include=["*"], **options)
    return sparse, copy.deepcopy(sparse), data


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights went through each autograd node of many weights."""
    counts: list[int] = []
    forward = ops._Together.forward

    def counted(ctx: Any, kind: Any, calls: Any, *learned: Tensor) -> Any:
        counts.append(len(calls))
        return forward(ctx, kind, calls, *learned)

    monkeypatch.setattr(ops._Together, "forward", staticmethod(counted))
    return counts


@pytest.mark.ci(here=["LBC-MLP", "SRSTE-MLP", "Transposable-ConvNet"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_model_to_the_bit_as_with_single_ops(method: str, model: str) -> None:
    one, data = compiled(MODELS[model], METHODS[method], pattern="1:2" if model == "Grouped" else "2:4")
    other, _ = compiled(MODELS[model], METHODS[method], pattern="1:2" if model == "Grouped" else "2:4")
    torch.manual_seed(2)
    first = steps(one, data, lambda module, x: module(x))
    torch.manual_seed(2)
    assert same(first, steps(other, data, single))


def test_all_weights_of_a_small_model_are_one_node(nodes: list[int]) -> None:
    sparse, _, data = pair()
    sparse(data).sum().backward()
    assert nodes == [6]


def test_the_gathered_graph_is_as_drawn(golden: Any) -> None:
    gm = nm.compile(chain(3), (torch.randn(3, 8),), method=nm.BiMask(), include=["*"]).graph(True)
    golden("gather_masks_bimask", show_graph(run(unpack(pack(gm), gm), [gather_masks])))


def test_a_chunk_ends_where_its_numbers_would_be_too_many() -> None:
    gm = nm.compile(chain(5), (torch.randn(3, 8),), method=nm.SRSTE(), include=["*"]).graph(True)
    twin = run(unpack(pack(gm), gm), [lambda each: gather_masks(each, limit=128)])
    sizes = [len(node.args[1]) for node in twin.graph.find_nodes(op="call_function", target=ops.together)]
    assert sizes == [2, 2]
    assert len(twin.graph.find_nodes(op="call_function", target=torch.ops.nm.srste_weight.default)) == 1


def test_mixed_patterns_and_dense_layers_between_are_the_same_to_the_bit() -> None:
    one, other, data = pair(nm.LBC, pattern={"0*": "2:4", "3*": "1:4", "*": "1:2"}, exclude=["2*"])
    assert same(steps(one, data, lambda module, x: module(x)), steps(other, data, single))


@pytest.mark.parametrize("method", ["LBC", "SRSTE", "Magnitude", "LBCBiMask"])
def test_partly_frozen_weights_and_scores_get_no_gradient(method: str) -> None:
    one, other, data = pair(METHODS[method])
    for sparse in (one, other):
        for index, (name, parameter) in enumerate(sparse.named_parameters()):
            parameter.requires_grad_(index % 3 != 0 and "2.weight_scores" not in name)
    one(data).sum().backward()
    single(other, data).sum().backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is not None) == (b.grad is not None) == a.requires_grad, name
        assert not a.requires_grad or torch.equal(a.grad, b.grad), name


class Twice(nn.Module):
    """A weight used twice, and one read under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(torch.tanh(self.a(x))))
        return self.d(torch.tanh(self.c(torch.tanh(self.a(x))))) + self.a.weight.mean()


@pytest.mark.ci(here=["[LBC", "[BiMask"])
@pytest.mark.parametrize("method", ["LBC", "SRSTE", "Magnitude", "BiMask"])
def test_shared_weights_and_weights_used_twice_sum_in_the_same_order(method: str) -> None:
    data = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    one = nm.compile(Twice(), (data,), method=METHODS[method](), include=["*"])
    other = copy.deepcopy(one)
    assert same(steps(one, data, lambda module, x: module(x)), steps(other, data, single))


def test_evaluation_and_no_grad_give_the_same_values(nodes: list[int]) -> None:
    sparse, _, data = pair(METHODS["BiMask"])
    for training in (True, False):
        sparse.train(training)
        with torch.no_grad():
            assert torch.equal(sparse(data), single(sparse, data))
        with torch.inference_mode():
            assert torch.equal(sparse(data), single(sparse, data))
    assert nodes == []


def test_copies_pickles_and_loaded_states_run_over_their_own_parameters(nodes: list[int]) -> None:
    sparse, _, data = pair()
    sparse(data)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        with torch.no_grad():
            other.get_parameter("0.weight").zero_()
        assert not other(data).any()
        assert sparse(data).any()
        other.load_state_dict({name: value.clone() for name, value in sparse.state_dict().items()}, assign=True)
        assert torch.equal(other(data), sparse(data))
    assert set(nodes) == {6}


def test_replaced_moved_and_retyped_parameters_are_followed() -> None:
    sparse, _, data = pair()
    sparse(data)
    sparse.origin[0].weight = nn.Parameter(torch.eye(8))
    assert torch.equal(sparse(data), single(sparse, data))
    sparse.double()
    data = data.double()
    assert torch.equal(sparse(data), single(sparse, data))
    assert sparse(data).dtype == torch.float64
    sparse(data).sum().backward()
    assert sparse.origin[0].weight.grad is not None


def test_another_graph_is_gathered_anew() -> None:
    sparse, _, data = pair(nm.SRSTE)
    before = sparse(data)
    gm = sparse.graph(True)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.nm.srste_weight.default):
        node.args = (node.args[0], 1, 4, *node.args[3:])
    gm.recompile()
    assert torch.equal(sparse(data), single(sparse, data))
    assert not torch.equal(sparse(data), before)


def test_torch_compile_takes_the_single_ops_before_and_after_eager_calls(nodes: list[int]) -> None:
    sparse, other, data = pair(nm.SRSTE)
    graphs = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    fast = torch.compile(sparse, backend=backend, fullgraph=True)
    expected = single(other, data)
    assert all(torch.equal(call(data), expected) for call in (fast, sparse, fast))
    assert nodes == [6]
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.nm.srste_weight.default in targets
    assert ops.together not in targets


def test_export_takes_the_single_ops() -> None:
    sparse, _, data = pair(nm.SRSTE)
    sparse(data)
    for strict in (False, True):
        program = torch.export.export(sparse, (data,), strict=strict)
        assert len([n for n in program.graph.nodes if n.target is torch.ops.nm.srste_weight.default]) == 6


def test_dispatch_modes_and_saved_tensor_hooks_see_single_ops(nodes: list[int]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    sparse, _, data = pair(nm.SRSTE)
    with Watching():
        sparse(data)
    assert seen.count(torch.ops.nm.srste_weight.default) == 6
    with torch.autograd.graph.save_on_cpu():
        sparse(data).sum().backward()
    assert nodes == []


@pytest.mark.ci(here=["LBC-False", "SRSTE-True"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["LBC", "SRSTE", "Magnitude"])
def test_a_checkpointed_call_recomputes_and_gives_the_same_gradients(method: str, reentrant: bool) -> None:
    one, other, data = pair(METHODS[method])
    data.requires_grad_()
    checkpoint(one, data, use_reentrant=reentrant).sum().backward()
    single(other, data).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", ["LBC", "SRSTE", "Magnitude"])
def test_hooks_on_gradients_see_the_same(method: str) -> None:
    one, other, data = pair(METHODS[method])
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for index, sparse in enumerate((one, other)):
        for parameter in sparse.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, to=seen[index]: to.append(p.grad.clone()))
        sparse.origin[1].weight.register_hook(lambda grad: 2 * grad)
    one(data).sum().backward()
    single(other, data).sum().backward()
    assert len(seen[0]) == len(seen[1]) == len(list(one.parameters()))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class TwoHeads(nn.Module):
    """Two results of weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def heads(method: str) -> tuple[nm.SparseModule, Tensor]:
    torch.manual_seed(0)
    data = torch.randn(3, 8)
    return nm.compile(TwoHeads(), (data,), method=METHODS[method](), include=["*"]), data


@pytest.mark.parametrize("method", ["LBC", "SRSTE", "Magnitude", "BiMask"])
def test_each_weight_has_a_backward_pass_of_its_own(method: str) -> None:
    sparse, data = heads(method)
    other = copy.deepcopy(sparse)
    first, second = sparse(data)
    first.sum().backward()
    assert all((p.grad is None) == name.startswith("b.") for name, p in sparse.named_parameters())
    second.sum().backward()
    sum(y.sum() for y in single(other, data)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(sparse.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", ["LBC", "SRSTE", "Magnitude", "BiMask"])
def test_nothing_is_propagated_back_to_weights_that_are_frozen(method: str) -> None:
    sparse, data = heads(method)
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_(name.startswith("b."))
    first, second = sparse(data)
    assert not first.requires_grad
    second.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in sparse.parameters())


@pytest.mark.parametrize("method", ["LBC", "SRSTE", "Magnitude"])
def test_a_second_backward_pass_needs_the_graph_retained(method: str) -> None:
    sparse, data = heads(method)
    masked = sparse(data)[0].sum()
    masked.backward(retain_graph=True)
    masked.backward()
    with pytest.raises(RuntimeError, match="second time"):
        masked.backward()


def test_weights_changed_before_the_backward_pass_are_an_error() -> None:
    for call in (lambda module, x: module(x), single):
        sparse, _, data = pair(nm.SRSTE)
        dense(sparse.origin[0], data)  # reads the dense weight
        loss = call(sparse, data).sum()
        with torch.no_grad():
            sparse.origin[0].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("method", ["SRSTE", "Magnitude", "LBC", "LBC-combination", "BiMask"])
def test_gradients_of_gradients_are_those_of_the_single_ops(method: str) -> None:
    one, other, data = pair(METHODS[method])
    one, other, data, found = one.double(), other.double(), data.double(), []
    for sparse, call in ((one, lambda module, x: module(x)), (other, single)):
        weights = [layer.weight for layer in sparse.origin]
        grads = torch.autograd.grad(call(sparse, data).square().sum(), weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))
    for first, second in zip(*found, strict=True):  # they are summed in another order
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_nothing_is_kept_once_the_graph_is_gone() -> None:
    for method in ("SRSTE", "Magnitude", "LBC"):
        sparse, _, data = pair(METHODS[method])
        gc.disable()
        try:
            result = sparse(data)
            node = weakref.ref(result)
            del result
            assert node() is None
            before = len([each for each in gc.get_objects() if issubclass(type(each), Tensor)])
            for _ in range(3):
                sparse(data)
            assert len([each for each in gc.get_objects() if issubclass(type(each), Tensor)]) == before
        finally:
            gc.enable()


def test_what_a_step_kept_is_free_after_its_backward_pass() -> None:
    sparse, _, data = pair(nm.SRSTE)
    loss = sparse(data).sum()
    node = loss.grad_fn
    while type(node).__name__ != "_TogetherBackward":
        node = next(each for each, _ in reversed(node.next_functions) if each is not None)
    assert all(node.entries)
    loss.backward()
    assert not any(node.entries)


@pytest.mark.parametrize("shapes", [[(8, 8), (4, 2, 4), (16, 24)], [(8, 8), (4, 3), (8, 16)]])
def test_masks_unpacked_at_once_are_those_unpacked_one_by_one(shapes: list[tuple[int, ...]]) -> None:
    masks = [torch.rand(shape) < 0.5 for shape in shapes]
    calls = [(combinations.pack(mask.flatten(1)), list(mask.shape)) for mask in masks]
    assert same(masks, list(ops.together(torch.ops.nm.unpack_mask.default, calls)))


def peak(call: Any) -> int:
    """The most bytes that were allocated at a time."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = sorted((e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("method", ["LBC", "SRSTE", "BiMask"])
def test_a_step_needs_no_more_memory_than_one_with_single_ops_and_a_chunk(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 2 * 128 * 128
    monkeypatch.setattr(gather_masks, "__kwdefaults__", {"limit": chunk})
    torch.manual_seed(0)
    data = torch.randn(64, 128)
    sparse = nm.compile(chain(8, 128), (data,), method=METHODS[method](), include=["*"])
    usual = []
    for call in (lambda module, x: module(x), single):
        call(sparse, data).sum().backward()
        usual.append(peak(lambda call=call: call(sparse, data).sum().backward()))
    assert usual[0] <= usual[1] + 2 * 4 * chunk  # weights under masks before they are used, gradients before they are masked


class Written(nn.Module):
    """Changes a state of two axes between two reads of it; activations in place, and counts, are nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu_(self.norm(self.a(x))))
        self.seen.add_(1)
        return self.d(torch.relu_(self.c(x))) + self.seen.sum()


def test_nothing_is_read_ahead_of_a_write_to_state() -> None:
    gm = nm.compile(Written(), (torch.randn(3, 8),), method=nm.SRSTE(), include=["*"]).graph(True)
    written = next(node for node in gm.graph.nodes if node.name == "add__1")
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.nm.srste_weight.default)[2:]:
        written.append(node)  # where it is read
    twin = run(unpack(pack(gm), gm), [gather_masks])
    assert [len(node.args[1]) for node in twin.graph.find_nodes(op="call_function", target=ops.together)] == [2, 2]


class Without(nn.Module):
    """A layer that runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.b(self.a(x))
        return self.d(self.c(x))


@pytest.mark.parametrize("method", ["LBC", "SRSTE"])
def test_weights_under_no_grad_are_not_joined_with_others(method: str) -> None:
    data = torch.randn(5, 8)
    one = nm.compile(Without(), (data,), method=METHODS[method](), include=["*"])
    other = copy.deepcopy(one)
    assert same(steps(one, data, lambda module, x: module(x)), steps(other, data, single))
    assert one.get_parameter("a.weight").grad is None


def test_meta_tensors_get_no_kernels(nodes: list[int]) -> None:
    sparse, _, data = pair(nm.SRSTE)
    assert sparse.to("meta")(data.to("meta")).is_meta
    assert nodes == []


def worker(rank: int, out: str) -> None:
    for name in ("LBC", "SRSTE", "Magnitude"):
        seen = []
        for alone in (False, True):
            sparse, _, _ = pair(METHODS[name])
            if alone:
                gm = sparse.graph(True)
                sparse.routes[True]._gathered = (type(gm).forward, gm)
            parallel = nn.parallel.DistributedDataParallel(sparse, bucket_cap_mb=1e-4)
            data = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank))
            optimizer = torch.optim.SGD(nm.parameter_groups(sparse, weight_decay=1e-3), lr=0.05, momentum=0.9)
            scheduler = nm.SparsityScheduler(parallel, total_steps=6)
            for _ in range(6):
                optimizer.zero_grad()
                parallel(data).square().mean().backward()
                optimizer.step()
                scheduler.step()
            seen.append([value.clone() for value in sparse.state_dict().values()])
        torch.save(same(*seen), f"{out}/{name}.{rank}")


@pytest.mark.ci
def test_two_processes_train_as_they_do_with_single_ops(tmp_path: Path) -> None:
    run_two(worker, str(tmp_path))
    assert [torch.load(each) for each in sorted(tmp_path.iterdir())] == [True] * 6


@pytest.mark.parametrize("method", [nm.LBC(), nm.SRSTE(), nm.Magnitude()], ids=lambda method: type(method).__name__)
def test_a_profile_has_the_names_of_the_single_ops(method: Any) -> None:
    model, x = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]), torch.randn(3, 16)
    sparse = nm.compile(model, (x,), method=method)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        sparse(x).sum().backward()
    names = [event.name for event in trace.events()]
    (forward,) = [name for name in names if name in ("nm::score_weight", "nm::srste_weight", "nm::masked_weight")]
    assert names.count(f"{forward}_backward") == 1
