# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""cuSPARSELt without a GPU: over a stand-in for the library that keeps two of four values and nothing else.

What only a GPU can show is in test_gpu.py.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cusparselt_standin import install, unpacked
from models import Attention, by_keyword
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.nn import functional

from nm_compiler.capture.export import capture_mode
from nm_compiler.errors import NMError
from nm_compiler.graph import run, show_graph
from nm_compiler.passes.lower_cusparselt import lower_cusparselt
from nm_compiler.pattern import Pattern, PatternMap
from nm_compiler.runtime.cusparselt.candidates import candidates
from nm_compiler.runtime.cusparselt.eligible import Machine, Product, machine_of, reasons, within_2_of_4
from nm_compiler.runtime.cusparselt.op import cslt_linear
from nm_compiler.runtime.cusparselt.packing import pack
from nm_compiler.runtime.cusparselt.search import search
from nm_compiler.runtime.cusparselt.unfold import Geometry, matrix_of, unfold_taps
from nm_compiler.sites.plan import Site, find
from nm_compiler.solvers.masks import masked

aten = torch.ops.aten
GPU = Machine("cuda", (9, 0), 800)
DTYPES = [torch.float16, torch.bfloat16]
HALVES = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
LAYOUTS = pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
CLOSE = {"rtol": 2e-2, "atol": 2e-2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return install(monkeypatch)


def sparse(out: int, inputs: int, dtype: torch.dtype = torch.float16, pattern: str = "2:4") -> Tensor:
    return masked(torch.randn(out, inputs) / inputs**0.5, pattern=pattern).to(dtype)


# --- the op


@HALVES
@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_the_product_is_the_dense_one_with_the_zeros(
    calls: Any, dtype: torch.dtype, rows: bool, tokens: int, biased: bool
) -> None:
    weight, x, bias = sparse(32, 48, dtype), torch.randn(tokens, 48).to(dtype), torch.randn(32).to(dtype) if biased else None
    y = cslt_linear(x, pack(weight), bias, 32, 48, 0, rows)
    torch.testing.assert_close(y, functional.linear(x, weight, bias), **CLOSE)
    padded = -(-tokens // 8) * 8
    assert y.stride() == ((32, 1) if rows else (1, padded))
    assert calls[0]["shape"] == (48, padded)
    assert calls[0]["bias"] is biased


@LAYOUTS
def test_inputs_of_any_strides_are_read_right_and_the_layouts_of_the_library_without_a_copy(calls: Any, rows: bool) -> None:
    weight = sparse(16, 32)
    packed, base = pack(weight), torch.randn(24, 100).half()
    given = {
        "rows": base[:16, :32].contiguous(), "columns": base[:16, :32].t().contiguous().t(), "columns of a wider one": base.t()[:32, :16].t(),
        "a slice of rows": base[:16, 4:36], "every second": base[:16, 0:64:2], "not aligned": base.flatten()[1 : 1 + 16 * 32].view(16, 32),
        "one for all": base[:1, :32].expand(16, 32),
    }  # fmt: skip
    for name, x in given.items():
        torch.testing.assert_close(
            cslt_linear(x, packed, None, 16, 32, 0, rows), functional.linear(x, weight), **CLOSE, msg=name
        )
        if name in ("rows", "columns"):
            assert calls[-1]["address"] == x.data_ptr(), name
            assert calls[-1]["contiguous"] is (name == "columns")


@LAYOUTS
def test_a_bias_of_any_stride_and_place_is_read_right(calls: Any, rows: bool) -> None:
    weight, x, base = sparse(16, 32), torch.randn(9, 32).half(), torch.randn(40).half()
    for bias in (base[1:17], base[:32:2], base[:1].expand(16)):
        found = cslt_linear(x, pack(weight), bias, 16, 32, 0, rows)
        torch.testing.assert_close(found, functional.linear(x, weight, bias), **CLOSE)


@LAYOUTS
@pytest.mark.parametrize("tokens", [8, 13])
def test_results_may_be_written_into_with_gradients_on(calls: Any, rows: bool, tokens: int) -> None:
    weight, bias = sparse(16, 32), nn.Parameter(torch.randn(16).half())
    x = torch.randn(tokens, 32).half().requires_grad_()
    y = cslt_linear(x, pack(weight), bias, 16, 32, 0, rows).view(1, tokens, 16).relu_()
    torch.testing.assert_close(y, functional.linear(x, weight, bias).relu()[None], **CLOSE)


@LAYOUTS
def test_no_tokens_at_all_give_no_rows(calls: Any, rows: bool) -> None:
    packed = pack(sparse(16, 32))
    y = cslt_linear(torch.empty(0, 32, dtype=torch.float16), packed, None, 16, 32, 0, rows)
    assert y.shape == (0, 16)
    assert calls == []


@LAYOUTS
@pytest.mark.parametrize("tokens", [8, 13])
def test_opcheck_passes_so_shapes_and_strides_are_those_of_the_fake_kernel(calls: Any, rows: bool, tokens: int) -> None:
    packed = pack(sparse(16, 32))
    for x in (torch.randn(tokens, 32).half(), torch.randn(32, tokens).half().t()):
        torch.library.opcheck(torch.ops.nm.cslt_linear, (x, packed, torch.randn(16).half(), 16, 32, 0, rows))


@LAYOUTS
@HALVES
def test_on_a_fake_gpu_the_op_says_shape_strides_and_device(rows: bool, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        packed = torch.empty(64, 18, dtype=dtype, device="cuda")
        y = cslt_linear(torch.empty(13, 32, dtype=dtype, device="cuda"), packed, None, 64, 32, 0, rows)
        z = cslt_linear(torch.relu(y), torch.empty(16, 36, dtype=dtype, device="cuda"), None, 16, 64, 0, True)
    assert (y.shape, y.device.type, y.dtype) == ((13, 64), "cuda", dtype)
    assert y.stride() == ((64, 1) if rows else (1, 16))
    assert (z.shape, z.stride()) == ((13, 16), (16, 1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 4, 32).half()}, "Flatten the tokens first"),
        ({"x": torch.zeros(4, 32)}, "takes float16 or bfloat16 of one dtype"),
        ({"x": torch.zeros(4, 32).bfloat16()}, "takes float16 or bfloat16 of one dtype"),
        ({"x": torch.zeros(4, 48).half()}, r"packed from \[16, 32\]; x needs 32 columns"),
        ({"packed": torch.zeros(16, 17).half()}, r"does not hold \[16, 32\]: pack that weight"),
        ({"packed": torch.zeros(32, 36).half()}, r"does not hold \[16, 32\]: pack that weight"),
        ({"bias": torch.zeros(15).half()}, r"a bias of \[15\] .* it has to be \[16\]"),
        ({"bias": torch.zeros(16)}, r"a bias of \[16\] \(float32, cpu\)"),
    ],
    ids=[
        "rank",
        "dtype",
        "other half",
        "columns",
        "packed too small",
        "packed from other outputs",
        "bias shape",
        "bias dtype",
    ],
)
def test_operands_that_do_not_fit_are_refused_before_the_library_sees_them(calls: Any, change: Any, says: str) -> None:
    given = {"x": torch.zeros(4, 32).half(), "bias": None, "packed": pack(sparse(16, 32))} | change
    with pytest.raises(NMError, match=says):
        cslt_linear(given["x"], given["packed"], given["bias"], 16, 32, 0, True)
    assert calls == []


@LAYOUTS
def test_torch_compile_takes_it_whole_at_any_number_of_tokens(calls: Any, rows: bool) -> None:
    first, second = sparse(32, 16), sparse(16, 32)
    packed, bias = (pack(first), pack(second)), torch.randn(32).half()

    def net(x: Tensor) -> Tensor:
        hidden = functional.gelu(cslt_linear(x * 2, packed[0], bias, 32, 16, 0, rows))
        return cslt_linear(hidden, packed[1], None, 16, 32, 0, rows).softmax(-1)

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (8, 13, 32):
        x = torch.randn(tokens, 16).half()
        dense = functional.linear(functional.gelu(functional.linear(x * 2, first, bias)), second).softmax(-1)
        torch.testing.assert_close(compiled(x), dense, **CLOSE)
    assert len(calls) == 6


# --- packing


@HALVES
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_a_packed_weight_keeps_every_value_in_nine_sixteenths_and_small_ones_in_more(
    calls: Any, dtype: torch.dtype, pattern: str
) -> None:
    for out, inputs, width in ((64, 128, 72), (48, 80, 51), (64, 288, 164), (64, 32, 20)):
        assert pack(sparse(out, inputs, dtype, pattern)).shape == (out, width)
    weight = sparse(32, 64, dtype, pattern)
    for given in (weight, weight[:, :, None, None], weight.t().contiguous().t(), nn.Parameter(weight)):
        packed = pack(given)
        assert packed.numel() * 16 >= weight.numel() * 9
        assert not packed.requires_grad
        assert torch.equal(unpacked(packed, 64), weight)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(16, 16), "cast it to float16 or bfloat16"),
        (torch.zeros(16, 16, dtype=torch.float16, device="meta"), "on the GPU that runs it"),
        (torch.zeros(16, 16, 3).half(), "only linears"),
        (torch.zeros(16, 24).half(), "multiples of 16"),
        (torch.zeros(0, 16).half(), "multiples of 16"),
        (torch.ones(16, 16).half(), "not 2:4 along its inputs: freeze the model first"),
        (sparse(16, 16).t(), "not 2:4 along its inputs"),
    ],
    ids=["float32", "meta", "taps", "columns", "empty", "dense", "other axis"],
)
def test_a_weight_that_the_library_would_refuse_or_cut_is_an_error(calls: Any, weight: Tensor, says: str) -> None:
    with pytest.raises(NMError, match=says):
        pack(weight)


# --- reasons

ELIGIBLE = Product("linear", (32, 64), torch.float16, Pattern(2, 4), 4096)
CONV = Product("conv2d", (32, 64, 1, 1), torch.bfloat16, Pattern(1, 4), None, Geometry())


def test_a_product_that_can_be_packed_has_no_reason() -> None:
    assert reasons(ELIGIBLE, GPU) == reasons(CONV, replace(GPU, capability=(8, 0))) == ()


@pytest.mark.parametrize(
    ("product", "machine", "says"),
    [
        (replace(ELIGIBLE, op="matmul"), GPU, "matmul is not lowered"),
        (replace(ELIGIBLE, pattern=Pattern(4, 8)), GPU, "4:8 can keep more than 2 of 4 neighbours"),
        (replace(ELIGIBLE, dtype=torch.float32), GPU, "float32: cast the model"),
        (replace(ELIGIBLE, dtype=torch.int8), GPU, "int8 without its scales"),
        (replace(ELIGIBLE, dtype=torch.float8_e4m3fn), GPU, "float8_e4m3fn without its scales"),
        (replace(ELIGIBLE, shape=(40, 64)), GPU, "40 output channels are no multiple of 16: make them 48"),
        (replace(ELIGIBLE, shape=(32, 72)), GPU, "72 input channels are no multiple of 16: make them 80"),
        (replace(CONV, shape=(32, 64, 3, 3), geometry=Geometry((3, 3))), GPU, "3x3 taps, a matrix product only by a copy of 9 times"),
        (replace(CONV, geometry=Geometry(stride=(2, 1))), GPU, "stride 2x1"),
        (replace(CONV, geometry=Geometry(sides=(0, 1, 0, 0))), GPU, "a padded 1x1 convolution"),
        (replace(CONV, groups=2), GPU, "2 conv groups"),
        (replace(ELIGIBLE, tokens=1), GPU, "1 tokens, and packed products tend to be slower below 1024"),
        (ELIGIBLE, Machine("cpu"), "the weight is on cpu"),
        (ELIGIBLE, Machine("cuda", None, 800), "torch finds no NVIDIA GPU"),
        (ELIGIBLE, Machine("cuda", (7, 5), 800), "compute capability 7.5 has no sparse tensor cores"),
        (ELIGIBLE, Machine("cuda", (9, 0), None), "built without cuSPARSELt"),
    ],
)  # fmt: skip
def test_each_reason_comes_alone_and_is_a_sentence_with_a_way_out(product: Product, machine: Machine, says: str) -> None:
    (found,) = reasons(product, machine)
    assert says in found
    assert ": " in found
    assert "\n" not in found
    assert not found.endswith(".")


def test_all_reasons_are_given_not_the_first() -> None:
    bad = Product("conv2d", (40, 36, 3, 3), torch.int8, Pattern(3, 4), 7, Geometry((3, 3), (2, 2)), groups=2)
    found = reasons(bad, Machine("cuda", (7, 0), None))
    assert len(found) == 9
    assert "40 output channels are no multiple of 32: make them 64" in found


def test_a_pattern_counts_as_2_of_4_exactly_when_no_choice_of_it_keeps_three_neighbours() -> None:
    for m in range(2, 17):
        for n in range(1, m):
            kept = torch.zeros(4 * m)
            worst = 0
            for shift in range(m):  # n neighbours at the end of one group and at the start of the next are the worst there is
                kept.zero_()
                for group in range(4):
                    start = max(0, min(m - n, shift if group % 2 == 0 else m - n - shift))
                    kept[group * m + start : group * m + start + n] = 1
                worst = max(worst, int(kept.view(-1, 4).sum(1).max()))
            assert within_2_of_4(Pattern(n, m)) is (worst <= 2), (n, m)


def test_here_there_is_no_gpu_and_a_machine_says_so() -> None:
    assert machine_of(torch.device("cpu")) == Machine("cpu")
    if not torch.cuda.is_available():
        assert machine_of(torch.device("cuda")).capability is None


# --- the search


@pytest.mark.parametrize("answer", [(3, 1, -1, 9), 3], ids=["a tuple", "a number"])
def test_the_winner_of_the_search_is_taken_if_it_computes_what_the_dense_product_does(
    calls: Any, monkeypatch: Any, answer: Any
) -> None:
    asked = offer(monkeypatch, answer)
    weight, x, bias = sparse(272, 256), torch.randn(261, 256).half(), torch.randn(272).half()
    assert search(weight, pack(weight), x, bias, rows=True) == 3
    assert asked == [((256, 264), True)]
    assert [call["alg_id"] for call in calls] == [3] * 5


def test_a_winner_that_computes_something_else_is_dropped_with_a_warning(calls: Any, monkeypatch: Any, caplog: Any) -> None:
    offer(monkeypatch, (7, 1, -1, 9))
    weight = sparse(256, 272)
    assert search(weight, pack(weight), torch.randn(256, 272).half(), None, rows=False) == 0
    assert "algorithm 7 of cuSPARSELt computes something else for [256, 272] and 256 tokens" in caplog.text


def test_without_a_search_or_with_one_that_fails_the_default_algorithm_stays(calls: Any, monkeypatch: Any) -> None:
    weight = sparse(256, 256)
    packed, x = pack(weight), torch.randn(256, 256).half()
    offer(monkeypatch, RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED"))
    assert search(weight, packed, x, None, rows=True) == 0
    monkeypatch.setattr(torch._C, "_cusparselt", None)
    monkeypatch.delattr(torch, "_cslt_sparse_mm_search")
    assert search(weight, packed, x, None, rows=True) == 0
    assert calls == []


@pytest.mark.parametrize(("out", "inputs", "tokens"), [(256, 64, 45), (240, 256, 256), (256, 240, 256), (256, 256, 255)])
def test_a_small_product_is_never_searched_because_that_was_seen_to_lose_the_gpu(
    calls: Any, monkeypatch: Any, out: int, inputs: int, tokens: int
) -> None:
    asked = offer(monkeypatch, (3, 1, -1, 9))
    weight = sparse(out, inputs)
    assert search(weight, pack(weight), torch.randn(tokens, inputs).half(), None, rows=True) == 0
    assert asked == calls == []


def offer(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[Any]:
    """A search that answers so; a number is what older versions of torch answer, by a function of another name."""
    asked: list[Any] = []

    class Library:
        @staticmethod
        def mm_search(packed: Tensor, dense: Tensor, bias: Any, alpha: Any, dtype: Any, rows: bool) -> Any:
            asked.append((tuple(dense.shape), rows))
            if isinstance(answer, Exception):
                raise answer
            return answer

    old = isinstance(answer, int)
    monkeypatch.setattr(torch._C, "_cusparselt", None if old else Library, raising=False)
    if old:
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", Library.mm_search)
    return asked


# --- the pass


class Blocks(nn.Module):
    """An MLP whose hidden values only packed products read, a residual, and a gate."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


class Pointwise(nn.Module):
    """Convolutions that are matrix products, and some that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 1)
        self.same = nn.Conv2d(32, 32, 1, bias=False, padding="same")
        self.wide = nn.Conv2d(32, 32, 3, padding=1)
        self.strided = nn.Conv2d(32, 32, 1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.same(torch.relu(self.first(x))))
        return self.grouped(self.strided(torch.relu(self.wide(x)))).flatten(1)


class Projections(nn.Module):
    """Slices of one weight, as cross-attention reads them, one weight for two products, and a product that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.joint, self.shared = nn.Parameter(torch.randn(48, 16) / 4), nn.Linear(16, 16)
        self.right = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (functional.linear(x, part) for part in self.joint.chunk(3))
        y = functional.scaled_dot_product_attention(q, k, v)
        return torch.tanh(self.shared(torch.tanh(self.shared(y)).view(-1, 16))) @ self.right.t()


def frozen(
    model: nn.Module, *inputs: Tensor, pattern: str = "2:4", dtype: torch.dtype = torch.float16
) -> tuple[GraphModule, dict[str, Site]]:
    """The graph of a model whose every weight that can be is N:M, and its sites."""
    model = model.eval().to(dtype)
    gm, _ = capture_mode(model, inputs, {}, training=False)
    plan = find(model, [gm], PatternMap.parse(pattern), include=["*"])
    with torch.no_grad():
        for site in plan.sites:
            weight = model.get_parameter(site.name)
            weight.copy_(masked(weight.float(), pattern=pattern, axis=site.in_axis))
    return gm, {site.name: site for site in plan.sites}


def lowered(gm: GraphModule, sites: dict[str, Site], **options: Any) -> GraphModule:
    options = {"machine": GPU, "min_tokens": 0} | options
    return run(gm, [lambda each: lower_cusparselt(each, sites_by_read=sites, **options)])


def count(gm: GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


PACKED = torch.ops.nm.cslt_linear.default


@HALVES
@pytest.mark.parametrize("shape", [(16,), (5, 16), (3, 5, 16), (2, 3, 5, 16)], ids=["1 axis", "2 axes", "3 axes", "4 axes"])
def test_a_lowered_mlp_computes_what_the_frozen_one_does_at_any_batch(
    calls: Any, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    model = Blocks()
    gm, sites = frozen(model, torch.randn(shape).to(dtype), dtype=dtype)
    gm = lowered(gm, sites)
    assert count(gm, PACKED) == 3
    assert count(gm, aten.linear.default) == 0
    for batch in (shape[0], 7) if len(shape) > 1 else (16,):
        x = torch.randn(batch, *shape[1:]).to(dtype)
        found, wanted = gm(x)[0], model(x)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.stride() == wanted.stride()


def test_hidden_values_stay_in_columns_between_packed_products_and_nothing_else_does(calls: Any) -> None:
    gm, sites = frozen(Blocks(), torch.randn(2, 8, 16).half())
    gm = lowered(gm, sites)
    gm(torch.randn(2, 8, 16).half())
    assert [call["contiguous"] for call in calls] == [False, False, True]  # down reads columns as they are
    assert count(gm, aten.contiguous.default) == 1  # and its own result is added to rows
    assert all(call["transpose_result"] is False for call in calls)
    (hidden,) = [node for node in gm.graph.nodes if node.target is aten.silu.default]
    assert hidden.meta["val"].stride()[-1] != 1  # what the graph says of itself is true


def test_ops_in_place_on_hidden_values_in_columns_do_what_they_did(calls: Any) -> None:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(0, 1), nn.Linear(32, 16), nn.Flatten()
    )
    gm, sites = frozen(model, torch.randn(2, 5, 16).half())
    gm = lowered(gm, sites)
    x = torch.randn(3, 5, 16).half()
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)


def test_a_view_between_packed_products_becomes_a_reshape(calls: Any) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x).view(-1, 5, 32)).view(-1, 32)).view(-1, 80)

    model = Viewed()
    gm, sites = frozen(model, torch.randn(10, 16).half())
    gm = lowered(gm, sites)
    x = torch.randn(15, 16).half()
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)
    assert [call["contiguous"] for call in calls] == [
        False,
        False,
    ]  # 15 tokens were padded, so the second product is given rows
    assert count(gm, aten.view.default) == 1


@pytest.mark.ci
def test_a_graph_deeper_than_the_recursion_limit_is_looked_through(calls: Any) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(sys.getrecursionlimit()):
                x = x + 1
            return self.fc(x)

    gm, sites = frozen(Deep(), torch.randn(8, 16).half())
    assert [c.reasons for c in candidates(gm, sites, machine=GPU, min_tokens=0)] == [()]


def test_one_dense_reader_is_enough_for_rows(calls: Any) -> None:
    gm, sites = frozen(Blocks(), torch.randn(2, 8, 16).half())
    gm = lowered(gm, sites, choose=lambda node: "down" not in str(node.args[1]))
    assert count(gm, PACKED) == 2
    assert count(gm, aten.contiguous.default) == 2


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("batch", [1, 3])
def test_1x1_convolutions_are_products_over_pixels_and_results_keep_their_memory_format(
    calls: Any, batch: int, channels_last: bool
) -> None:
    model = Pointwise()
    form = torch.channels_last if channels_last else torch.contiguous_format
    example = torch.randn(2, 16, 4, 6).half().contiguous(memory_format=form)
    model = model.to(memory_format=form)
    gm, sites = frozen(model, example)
    reasons_of = {c.site.name: c.reasons for c in candidates(gm, sites, machine=GPU, min_tokens=0)}
    assert {c.product.tokens for c in candidates(gm, sites)} == {48, 12}
    assert {c.product.geometry.stride for c in candidates(gm, sites)} == {(1, 1), (2, 2)}
    gm = lowered(gm, sites)
    assert count(gm, PACKED) == 2
    assert [name for name, why in reasons_of.items() if not why] == ["first.weight", "same.weight"]
    assert "3x3 taps" in reasons_of["wide.weight"][0]
    assert "stride 2x2" in reasons_of["strided.weight"][0]
    assert "2 conv groups" in reasons_of["grouped.weight"][0]
    x = torch.randn(batch, 16, 4, 6).half().contiguous(memory_format=form)
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["channels first", "channels last"])
def test_a_lowered_convolution_returns_the_strides_it_was_traced_with(calls: Any, form: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU()).to(memory_format=form)
    gm, sites = frozen(model, torch.randn(2, 16, 4, 6).half().contiguous(memory_format=form))
    gm = lowered(gm, sites)
    for batch in (1, 2, 3):
        x = torch.randn(batch, 16, 4, 6).half().contiguous(memory_format=form)
        assert gm(x)[0].is_contiguous(memory_format=form)
        torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)


class Convs(nn.Module):
    """What a convolution of one group can be: taps, strides, paddings by number and by name, dilations."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Conv2d(16, 32, 3, padding=1)
        self.strided = nn.Conv2d(32, 16, (3, 1), stride=(2, 1), padding=(0, 2), bias=False)
        self.even = nn.Conv2d(16, 32, (2, 4), padding="same", dilation=(1, 2))
        self.skip = nn.Conv2d(32, 16, 1, stride=2)
        self.border = nn.Conv2d(16, 16, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.border(torch.relu(self.skip(torch.relu(self.even(torch.relu(self.strided(torch.relu(self.taps(x)))))))))


@pytest.mark.ci(here=["channels last"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["channels first", "channels last"])
def test_unfolded_convolutions_compute_what_they_did_at_any_batch_and_size(calls: Any, form: torch.memory_format) -> None:
    model = Convs().to(memory_format=form)
    gm, sites = frozen(model, torch.randn(2, 16, 9, 7).half().contiguous(memory_format=form))
    assert all(each.reasons for each in candidates(gm, sites, machine=GPU, min_tokens=0))
    gm = lowered(gm, sites, unfold=True)
    assert count(gm, PACKED) == count(gm, torch.ops.nm.unfold_taps.default) == 5
    for batch in (1, 3):
        x = torch.randn(batch, 16, 9, 7).half().contiguous(memory_format=form)
        found, wanted = gm(x)[0], model(x)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.is_contiguous(memory_format=form)
    with torch.no_grad():
        compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x)[0], wanted, **CLOSE)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Blocks(), (5, 16)), (Pointwise(), (2, 16, 4, 6)), (Convs(), (2, 16, 9, 7))],
    ids=["linear", "1x1", "taps"],
)
def test_arguments_that_a_graph_gives_by_keyword_are_read_too(calls: Any, model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).half()
    gm, sites = frozen(copy.deepcopy(model), x)
    wanted = gm(x)[0]
    gm = lowered(by_keyword(gm), sites, unfold=True)
    assert count(gm, PACKED) >= 3
    torch.testing.assert_close(gm(x)[0], wanted, **CLOSE)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
def test_unfolding_lays_taps_outside_and_channels_inside_and_opcheck_passes(channels_last: bool) -> None:
    x, weight = torch.randn(2, 4, 7, 6), masked(torch.randn(8, 4, 3, 2), pattern="2:4", axis=1)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    given = (x, [3, 2], [2, 1], [1, 0, 2, 1], [1, 2])
    rows = unfold_taps(*given)
    wanted = functional.conv2d(functional.pad(x, (1, 0, 2, 1)), weight, None, (2, 1), 0, (1, 2))
    torch.testing.assert_close((rows @ matrix_of(weight).t()).movedim(-1, 1), wanted)
    assert matrix_of(weight).unflatten(1, (-1, 4)).count_nonzero(-1).max() == 2
    assert torch.equal(unfold_taps(x[0], *given[1:]), rows[0])
    assert rows.is_contiguous()
    torch.library.opcheck(torch.ops.nm.unfold_taps, given)


def test_an_image_without_a_batch_axis_is_lowered_too(calls: Any) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU())
    gm, sites = frozen(model, torch.randn(16, 4, 6).half())
    gm = lowered(gm, sites)
    x = torch.randn(16, 4, 6).half()
    assert count(gm, PACKED) == 1
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)


def test_slices_are_packed_by_themselves_a_shared_weight_once_and_a_matmul_stays_dense(calls: Any, monkeypatch: Any) -> None:
    model = Projections()
    gm, sites = frozen(model, torch.randn(2, 8, 16).half())
    (why,) = [c.reasons for c in candidates(gm, sites, machine=GPU, min_tokens=0) if c.site.name == "right"]
    assert "matmul is not lowered" in why[0]
    compress, made = torch._cslt_compress, list[Tensor]()

    def counted(matrix: Tensor) -> Tensor:
        made.append(matrix)
        return compress(matrix)

    monkeypatch.setattr(torch, "_cslt_compress", counted)
    gm = lowered(gm, sites)
    assert len(made) == 4
    assert count(gm, PACKED) == 5
    packed = [node.target for node in gm.graph.nodes if node.op == "get_attr" and str(node.target).endswith("_packed")]
    assert len(set(packed)) == 4
    x = torch.randn(3, 8, 16).half()
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)


def test_lowering_leaves_the_model_alone_and_keeps_what_it_packs_out_of_the_state(calls: Any) -> None:
    model = Blocks()
    gm, sites = frozen(model, torch.randn(2, 8, 16).half())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = lowered(gm, sites)
    assert set(gm.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "up_weight" not in {node.target for node in gm.graph.nodes}


def test_without_a_gpu_with_too_few_tokens_or_in_float32_nothing_is_rewritten(calls: Any) -> None:
    for dtype, options, says in (
        (torch.float16, {"machine": None}, "the weight is on cpu"),
        (torch.float16, {"min_tokens": 17}, "16 tokens"),
        (torch.float32, {}, "float32: cast"),
    ):
        gm, sites = frozen(Blocks(), torch.randn(2, 8, 16).to(dtype), dtype=dtype)
        before = show_graph(gm)
        asked = {"machine": GPU, "min_tokens": 0} | options
        assert all(says in "; ".join(c.reasons) for c in candidates(gm, sites, **asked))
        assert show_graph(lowered(gm, sites, **options)) == before


def test_a_weight_that_was_not_frozen_has_that_reason_and_stays_dense(calls: Any) -> None:
    model = Blocks()
    gm, sites = frozen(model, torch.randn(2, 8, 16).half())
    with torch.no_grad():
        model.up.weight[3, 4:7] = 1.0
    why = {c.site.name: c.reasons for c in candidates(gm, sites, machine=GPU, min_tokens=0)}
    assert "freeze the model first" in why["up.weight"][0]
    assert count(lowered(gm, sites), PACKED) == 2


def test_only_planned_weights_are_lowered(calls: Any) -> None:
    gm, sites = frozen(Blocks(), torch.randn(2, 8, 16).half())
    assert count(lowered(gm, {"up.weight": sites["up.weight"]}), PACKED) == 1


def test_a_searched_algorithm_writes_rows_and_needs_no_copy(calls: Any, monkeypatch: Any) -> None:
    model = Blocks(256)
    gm, sites = frozen(model, torch.randn(2, 128, 256).half())
    asked = offer(monkeypatch, (3, 1, -1, 9))
    gm = lowered(gm, sites, search=True)
    assert [shape for shape, _ in asked] == [(256, 256), (256, 256), (512, 256)]
    assert count(gm, aten.contiguous.default) == 0
    calls.clear()
    x = torch.randn(3, 128, 256).half()
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)
    assert {(call["alg_id"], call["transpose_result"]) for call in calls} == {(3, True)}


@pytest.mark.ci
def test_inductor_compiles_a_lowered_graph_whole(calls: Any) -> None:
    model = Blocks()
    gm, sites = frozen(model, torch.randn(2, 8, 16).half())
    compiled = torch.compile(lowered(gm, sites), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            x = torch.randn(batch, 8, 16).half()
            torch.testing.assert_close(compiled(x)[0], model(x), **CLOSE)
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["attention", "mlp", "pointwise"])
def test_the_graph_is_as_read(calls: Any, golden: Callable[[str, str], None], name: str) -> None:
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "attention": (Attention(), torch.zeros(2, 6, dtype=torch.long)), "mlp": (Blocks(), torch.randn(2, 8, 16).half()),
        "pointwise": (Pointwise(), torch.randn(2, 16, 4, 6).half()),
    }  # fmt: skip
    golden(f"lower_cusparselt_{name}", show_graph(lowered(*frozen(*made[name]))))
