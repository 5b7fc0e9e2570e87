# mypy: disable-error-code="arg-type,attr-defined,index,no-any-return,no-untyped-call,operator,union-attr"
"""``with torch.autocast`` in a model's own forward(): the weights in it are found, and every op runs in the dtype that it had."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import nm_compiler as nm
from nm_compiler.capture.bodies import autocast
from nm_compiler.capture.export import capture_mode
from nm_compiler.capture.records import move_devices
from nm_compiler.fragments.aten import to_aten
from nm_compiler.graph import show_graph
from nm_compiler.passes.spell_out_autocast import spell_out_autocast
from nm_compiler.unwrapping import unwrap

Golden = Callable[[str, str], None]
BF16 = torch.autocast("cpu", torch.bfloat16)


class Mixed(nn.Module):
    """A stem, a block in bfloat16 with an island of float32 in it, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.fc, self.conv, self.island = nn.Linear(16, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 16)

    def block(self, x: Tensor) -> Tensor:
        x = self.conv(self.fc(x).relu().mT).mT
        with torch.autocast("cpu", enabled=False):
            y = self.island(x.float())
        return torch.softmax(x @ y.mT, -1) @ x

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.block(x)
        return self.head(x.float())


def data() -> Tensor:
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(data()).square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.ci(here=["LBC", "BiMask"])
@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask(), nm.SRSTE(), nm.Magnitude()], ids=lambda each: each.name)
def test_weights_in_a_region_train_as_masked_ones_there_would(method: nm.Method) -> None:
    torch.manual_seed(0)
    model = Mixed()
    twin = copy.deepcopy(model)
    sparse = nm.compile(model, data(), method=method)
    planned = [weight.site.name for weight in sparse.weights]
    assert planned == ["fc.weight", "conv.weight", "island.weight"]
    for name in planned:
        twin.get_parameter(name).data = sparse.masked(name)[0]
    (loss, ours), (expected, theirs) = gradients(sparse), gradients(twin)
    assert torch.equal(loss, expected)
    assert torch.equal(ours["head.weight"], theirs["head.weight"])
    assert torch.equal(ours["stem.weight"], theirs["stem.weight"]) == (not isinstance(method, nm.BiMask))
    if isinstance(method, nm.Magnitude):
        for name in planned:
            assert torch.equal(ours[name], theirs[name] * sparse.masked(name)[0].ne(0))


def test_an_island_of_float32_stays_one_under_the_callers_autocast() -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            with torch.autocast("cpu", enabled=False):
                y = self.fc(x.float())
            return y, self.head(y)

    sparse = nm.compile(Island(), data(), method=nm.SRSTE())
    assert [weight.site.name for weight in sparse.weights] == ["fc.weight"]
    with BF16:
        y, out = sparse(data())
    assert (y.dtype, out.dtype) == (torch.float32, torch.bfloat16)


class Following(Mixed):
    """It takes dtypes from its data, as stochastic depth and RMS norms do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.fc(x)
        kept = torch.empty(len(y), 1, 1, dtype=y.dtype).bernoulli_(0.5)
        x = x + kept * y
        x = (x.float() * x.float().square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)
        return self.head(x + self.island(x))


def test_captured_under_autocast_a_model_has_the_dtypes_that_its_data_have_there() -> None:
    torch.manual_seed(0)
    model = Following()
    twin = copy.deepcopy(model)
    with BF16:
        sparse = nm.compile(model, data(), method=nm.LBC())  # which starts dense
        torch.manual_seed(1)
        loss, ours = gradients(sparse)
        torch.manual_seed(1)
        expected, theirs = gradients(twin)
    assert {weight.site.name for weight in sparse.weights} == {"fc.weight", "island.weight"}
    assert torch.equal(loss, expected)
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


@pytest.mark.ci
def test_compiled_copied_and_pickled_models_keep_their_regions() -> None:
    torch.manual_seed(0)
    sparse = nm.compile(Mixed(), data(), method=nm.SRSTE())
    expected, buffer = sparse(data()), io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(sparse), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(data()), expected)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(data()), expected)


def test_a_region_in_which_an_op_fails_leaves_autocast_as_it_was() -> None:
    sparse = nm.compile(Mixed(), data(), method=nm.SRSTE())
    sparse.origin.fc.weight.data = torch.zeros(3, 3)
    with pytest.raises((nm.NMError, RuntimeError)):
        sparse(data())
    assert not torch.is_autocast_enabled("cpu")


def test_permuting_and_calibrating_look_into_regions() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    expected = model(data())
    permutation = nm.permute(model, data())
    assert "stem.weight[0]" in str(permutation)
    torch.testing.assert_close(model(data()), expected, rtol=0.02, atol=0.02)
    seen: list[Tensor] = []
    model.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0].to(torch.bfloat16)))
    model(data())
    model.fc._forward_pre_hooks.clear()
    squares = nm.calibrate(model, [data()]).squares["fc.weight"]
    torch.testing.assert_close(squares.expand(16, 16)[0], seen[0].double().square().sum((0, 1)), rtol=1e-6, atol=0)


@pytest.mark.ci(here=["dense"])
@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_a_frozen_model_is_lowered_with_its_casts(backend: str) -> None:
    torch.manual_seed(0)
    model = nm.freeze(nm.compile(Mixed(), data(), method=nm.Magnitude())).eval()
    lowered = nm.lower(model, data(), backend=backend, force=["fc.weight"] if backend == "cpu" else [])
    torch.testing.assert_close(lowered(data()), model(data()), rtol=0.02, atol=0.02)
    assert {"fc.weight", "conv.weight", "island.weight"} <= set(lowered.sites)


def test_spelled_out_the_casts_are_in_the_graph(golden: Golden) -> None:
    torch.manual_seed(0)
    gm, _ = capture_mode(Mixed(), (data(),), {}, training=False)
    flat = spell_out_autocast(gm)
    assert gm.graph.find_nodes(op="call_function", target=autocast), "the graph that was given keeps its regions"
    golden("spell_out_autocast", show_graph(flat))


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "addmm": lambda x, w: torch.addmm(x, x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None]),
    "cat": lambda x, w: torch.cat([x, F.linear(x, w)]),
    "stack": lambda x, w: torch.stack([F.linear(x, w), x]),
    "softmax": lambda x, w: torch.softmax(F.linear(x, w), -1),
    "layer_norm": lambda x, w: F.layer_norm(F.linear(x, w), (8,)),
    "mse_loss": lambda x, w: F.mse_loss(F.linear(x, w), x.to(torch.bfloat16)),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None, None], F.linear(x, w)[None, None], x[None, None]),
    "explicit": lambda x, w: F.linear(x, w).double() + x,
    "in place": lambda x, w: F.linear(x, w).add_(x).relu_(),
    "nested": lambda x, w: _nested(x, w),
    "no_grad": lambda x, w: _without_gradients(x, w),
    "scalar": lambda x, w: F.linear(x, w) * x.shape[0],
}  # fmt: skip


def _nested(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        y = F.linear(x, w)
        with torch.autocast("cpu", enabled=False):
            z = F.linear(x, w)
    return y.float() + z


def _without_gradients(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.linear(x, w)
    return y + F.linear(x, w)


class Region(nn.Module):
    def __init__(self, op: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.op = nn.Parameter(torch.randn(8, 8)), op

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.op(x, self.weight)


@pytest.mark.parametrize("name", OPS)
def test_spelled_out_an_op_gives_the_bits_and_the_dtype_that_it_gives_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    model, x = Region(OPS[name]), torch.randn(8, 8)
    gm, signature = capture_mode(model, (x,), {}, training=False)
    flat = spell_out_autocast(gm)
    (found,) = flat(*signature.flatten((x,), {}))
    expected = model(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert flat.graph.output_node().args[0][0].meta["val"].dtype == expected.dtype


def test_a_region_follows_its_model_to_another_device() -> None:
    gm, _ = capture_mode(Mixed(), (data(),), {}, training=True)
    mode = torch._subclasses.FakeTensorMode()

    def to_cuda(value: Tensor) -> Tensor:
        with mode:
            return torch.empty(value.shape, device="cuda")

    move_devices(gm, lambda value: value.to("meta"))
    regions = gm.graph.find_nodes(op="call_function", target=autocast)
    assert [node.args[0] for node in regions] == ["cpu"], "meta is no device for autocast"
    move_devices(gm, to_cuda)
    assert [node.args[0] for node in regions] == ["cuda"]


class Attending(nn.Module):
    """Under autocast: a mask and a sum that take their dtype from the data, both of ops that want one dtype of all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v, self.island, self.head = (nn.Linear(8, 8) for _ in range(6))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        mask = torch.zeros(1, 6, 6, dtype=q.dtype).masked_fill(torch.ones(6, 6).triu(1).bool(), -100.0)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0]
        return torch.zeros_like(x, dtype=q.dtype).index_add_(1, torch.arange(6), y)

    def between(self, x: Tensor) -> Tensor:
        """What parts the call, so that TorchDynamo has to open the region again."""
        torch._dynamo.graph_break()
        return x if bool((x.detach().float() < 1e9).all()) else 2 * x

    def body(self, x: Tensor) -> Tensor:
        return self.between(self.attend(x))

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        x = self.body(x)
        with torch.autocast("cpu", enabled=False):
            y = self.island(x.float())
        return self.head(self.between(y)), x, y, x.float() * 1.01

    def forward(self, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype):
            return self.run(x)


class Checkpointed(Attending):
    def body(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False)


class Choosing(Attending):
    """torch itself has no backward of it under autocast: "expected scalar type Float but found BFloat16"."""

    def body(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() < 1e9, self.attend, lambda x: self.attend(x) * 2, (x,))


class Method(Attending):
    """Layers that Python calls within the region: each is a frame of its own, and finds it open."""

    def body(self, x: Tensor) -> Tensor:
        return self.deep(x)

    def deep(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        torch._dynamo.graph_break()
        return self.v(x)


def outputs_and_gradients(model: nn.Module, *args: object) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    outputs = model(data(), *args)
    torch.stack([each.float().square().mean() for each in outputs]).sum().backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.ci(here=["Checkpointed-bfloat16-live"])
@pytest.mark.parametrize("how", ["live", "aot_eager", "captured"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [Attending, Checkpointed, Choosing, Method])
def test_fragments_of_a_region_have_the_dtypes_of_the_model(kind: type[Attending], dtype: torch.dtype, how: str) -> None:
    if kind is Choosing and how == "aot_eager":
        pytest.skip("torch.compile of the dense model fails in its backward pass, too")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = kind()
    twin: nn.Module = Method() if kind is Method else Attending()
    twin.load_state_dict(model.state_dict())
    sparse: Any
    if how == "captured":
        sparse = nm.compile(model, (data(), dtype), method=nm.Magnitude())
    else:
        sparse = nm.compile(model, method=nm.Magnitude(), then="eager" if how == "live" else how)
        sparse(data(), dtype)
    carrier = unwrap(sparse)
    planned = {weight.site.name: carrier.masked(weight.site.name)[0].detach().clone() for weight in carrier.weights}
    assert set(planned) >= {"q.weight", "k.weight", "v.weight"}
    for name, value in planned.items():
        twin.get_parameter(name).data = value
    (found, ours), (expected, theirs) = outputs_and_gradients(sparse, dtype), outputs_and_gradients(twin, dtype)
    assert [each.dtype for each in found] == [each.dtype for each in expected] == [dtype, dtype, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    near = 0.01 * max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        kept = planned[name].ne(0) if name in planned else 1
        torch.testing.assert_close(ours[name] * kept, gradient * kept, rtol=0.01, atol=near)
    assert not torch.is_autocast_enabled("cpu")


def test_forward_wrapped_in_autocast_as_accelerate_does_it() -> None:
    class Parted(Attending):
        def forward(self, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
            return self.run(x)

    torch._dynamo.reset()
    sparse: Any = nm.compile(Parted(), method=nm.LBC(), then="eager")  # which starts dense
    twin: Any = Parted()
    twin.load_state_dict({name: value for name, value in sparse.state_dict().items() if name in twin.state_dict()})
    for each in (sparse, twin):
        each.forward = BF16(each.forward)
    with torch.no_grad():
        found, expected = sparse(data()), twin(data())
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_op_that_fails_while_a_fragment_is_lowered_leaves_autocast_as_it_was() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = FakeTensorMode().from_tensor(torch.ones(2, 8))
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, True))
    graph.output((graph.call_function(torch.mm, (x, x)),))
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        to_aten(torch.fx.GraphModule(nn.Module(), graph))
    assert not torch.is_autocast_enabled("cpu")
