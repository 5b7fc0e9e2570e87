# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The library called without torch's op: over C functions that work on a CPU's memory. What only a GPU can show is in test_gpu.py."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cusparselt_library import CONFIGS, FAILING, REFUSED, STREAM, WRONG, FakeFunctions, direct
from cusparselt_standin import install
from torch import Tensor, nn
from torch.nn import functional

from nm_compiler.capture.export import capture_mode
from nm_compiler.errors import NMError
from nm_compiler.graph import run, show_graph
from nm_compiler.passes import lower_cusparselt as lowering
from nm_compiler.passes.lower_cusparselt import lower_cusparselt
from nm_compiler.pattern import PatternMap
from nm_compiler.runtime.cusparselt import direct as direct_module
from nm_compiler.runtime.cusparselt import int8, library, op, trials
from nm_compiler.runtime.cusparselt import search as searching
from nm_compiler.runtime.cusparselt.algorithm import Algorithm
from nm_compiler.runtime.cusparselt.direct import Direct, binding
from nm_compiler.runtime.cusparselt.eligible import Machine
from nm_compiler.runtime.cusparselt.int8 import cslt_linear_int8, pack_int8
from nm_compiler.runtime.cusparselt.library import Library, Structs, found, opened
from nm_compiler.runtime.cusparselt.op import cslt_linear, multiply
from nm_compiler.runtime.cusparselt.packing import pack
from nm_compiler.runtime.cusparselt.plan import CONFIGS as HOW_MANY
from nm_compiler.runtime.cusparselt.plan import Plan, Problem
from nm_compiler.runtime.cusparselt.plans import Plans
from nm_compiler.runtime.cusparselt.search import search
from nm_compiler.sites.plan import find
from nm_compiler.solvers.masks import masked

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
LAYOUTS = pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
CLOSE = {"rtol": 2e-2, "atol": 2e-2}
PROBLEM = Problem(-1, torch.float16, torch.float16, 32, 48, 16, False, True)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torch's own call was called with."""
    return install(monkeypatch)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch, by_torch: Any) -> FakeFunctions:
    """The library, in the op's hands."""
    made = FakeFunctions()
    bound = direct(made)
    monkeypatch.setattr(op, "binding", lambda _: bound)
    monkeypatch.setattr(int8, "binding", lambda _: bound)
    return made


def sparse(out: int, inputs: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return masked(torch.randn(out, inputs) / inputs**0.5, pattern="2:4").to(dtype)


# --- products


@HALVES
@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 8, 13])
@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize(("out", "inputs"), [(32, 48), (64, 288)])
def test_the_product_is_the_dense_one_in_every_layout_and_torch_is_not_asked(
    functions: Any, by_torch: Any, dtype: torch.dtype, rows: bool, tokens: int, activation: str, out: int, inputs: int
) -> None:
    weight, bias = sparse(out, inputs, dtype), torch.randn(out).to(dtype)
    packed, x = pack(weight), torch.randn(tokens, inputs).to(dtype)
    for b in (None, bias):
        wanted = functional.linear(x, weight, b)
        wanted = wanted.relu() if activation else wanted
        for given in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :inputs]):
            y = cslt_linear(given, packed, b, out, inputs, 0, rows, activation)
            torch.testing.assert_close(y, wanted, **CLOSE)
            assert y.stride() == ((out, 1) if rows else (1, -(-tokens // 8) * 8))
    assert by_torch == []
    assert {launch["stream"] for launch in functions.launches} == {STREAM}


@LAYOUTS
def test_opcheck_passes_and_compiled_whole_it_is_the_same(functions: Any, by_torch: Any, rows: bool) -> None:
    weight, bias = sparse(32, 16), torch.randn(32).half()
    packed = pack(weight)

    def net(x: Tensor) -> Tensor:
        return cslt_linear(x * 2, packed, bias, 32, 16, 0, rows, "relu") + 1

    for tokens in (8, 13):
        x = torch.randn(tokens, 16).half()
        torch.library.opcheck(torch.ops.nm.cslt_linear, (x, packed, bias, 32, 16, 0, rows, "relu"))
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), functional.linear(x * 2, weight, bias).relu() + 1, **CLOSE)
    assert by_torch == []


def test_an_activation_that_the_library_is_not_asked_for_is_refused(functions: Any) -> None:
    with pytest.raises(NMError, match="no activation 'gelu': leave it an op of its own"):
        cslt_linear(torch.zeros(8, 16).half(), pack(sparse(16, 16)), None, 16, 16, 0, True, "gelu")


@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 16, 21])
def test_products_in_8_bits_take_their_scales_on_the_device(functions: Any, by_torch: Any, rows: bool, tokens: int) -> None:
    weight, x, bias = sparse(64, 32), torch.randn(tokens, 32).half(), torch.randn(64).half()
    packed, scale = pack_int8(weight)
    y = cslt_linear_int8(x, packed, scale, bias, 32, rows)
    wanted = functional.linear(x, weight, bias)
    assert float((y - wanted).norm()) < 0.03 * float(wanted.norm())
    assert y.stride() == ((64, 1) if rows else (1, -(-tokens // 16) * 16))
    assert [launch["attributes"] for launch in functions.launches] == [{5: 1}]
    assert by_torch == []


# --- plans


def test_a_second_call_makes_nothing_and_launches_once(functions: Any) -> None:
    weight, bias = sparse(32, 48), torch.randn(32).half()
    packed = pack(weight)
    cslt_linear(torch.randn(16, 48).half(), packed, bias, 32, 48, 0, True)
    before = functions.calls.copy()
    for _ in range(3):
        x = torch.randn(16, 48).half()
        torch.testing.assert_close(cslt_linear(x, packed, bias, 32, 48, 0, True), functional.linear(x, weight, bias), **CLOSE)
    assert functions.calls - before == {"cusparseLtMatmul": 3}


def test_weights_of_one_shape_share_a_plan_and_whatever_a_plan_depends_on_has_its_own(functions: Any) -> None:
    bound = op.binding(torch.device("cpu"))
    bias, other, x = torch.randn(32).half(), torch.randn(32).half(), torch.randn(16, 48).half()
    first, second, taller, bf16 = (
        pack(sparse(32, 48)),
        pack(sparse(32, 48)),
        pack(sparse(48, 48)),
        pack(sparse(32, 48, torch.bfloat16)),
    )
    multiply(first, x, bias, 32, rows=True)
    multiply(second, x, bias, 32, rows=True)
    assert len(bound.plans) == 1
    for number, call in enumerate((
        lambda: multiply(first, x, other, 32, rows=True),
        lambda: multiply(first, x, None, 32, rows=True),
        lambda: multiply(first, x, bias, 32, rows=False),
        lambda: multiply(first, x.t().contiguous().t(), bias, 32, rows=True),
        lambda: multiply(first, x, bias, 32, rows=True, activation="relu"),
        lambda: multiply(first, x, bias, 32, rows=True, algorithm=1),
        lambda: multiply(first, x, bias, 32, rows=True, algorithm=Algorithm(1, split=2).code),
        lambda: multiply(first, torch.cat([x, x]), bias, 32, rows=True),
        lambda: multiply(taller, x, None, 48, rows=True),
        lambda: multiply(bf16, x.bfloat16(), None, 32, rows=True),
    ), 2):  # fmt: skip
        kept = [call(), call()]
        assert torch.equal(*kept)
        assert len(bound.plans) == number


def test_an_algorithm_becomes_its_configuration_its_slices_and_how_they_are_added(functions: Any) -> None:
    packed, x = pack(sparse(32, 48)), torch.randn(16, 48).half()
    for code in (0, 2, Algorithm(0, split=1).code, Algorithm(2, split=4, mode=2).code):
        multiply(packed, x, None, 32, rows=True, algorithm=code)
    assert [launch["numbers"] for launch in functions.launches] == [{}, {0: 2}, {0: 0, 3: 1}, {0: 2, 3: 4, 4: 2}]
    assert [Algorithm.of(code).code for code in (0, 5, 65536, 0x2040007)] == [0, 5, 65536, 0x2040007]


def test_of_many_plans_the_one_used_longest_ago_is_destroyed_with_all_it_is_made_of() -> None:
    fake = FakeFunctions()
    plans = Plans(Library(fake, 800), most=2)
    problems = [PROBLEM._replace(tokens=8 * (1 + number)) for number in range(3)]
    first = plans.find(problems[0])
    plans.find(problems[1])
    assert plans.find(problems[0]) is first
    alive = len(fake.live)
    plans.find(problems[2])
    assert len(plans) == 2
    assert fake.calls["cusparseLtMatmulPlanDestroy"] == 1
    assert fake.calls["cusparseLtMatDescriptorDestroy"] == 3
    assert len(fake.live) == alive + 1  # of the product's own descriptor nothing has to be given back
    assert plans.find(problems[0]) is first
    plans.close()
    assert not [facts for facts in fake.live.values() if "thread" in facts or "numbers" in facts]


def test_every_thread_has_its_own_handle_and_plans_which_end_with_it() -> None:
    fake = FakeFunctions()
    bound, packed, x = direct(fake), torch.zeros(32, 40).half(), torch.zeros(48, 16).half()
    results: list[Any] = []

    def work() -> None:
        results.append(bound.product(packed, x, None, 32, rows=True))
        results.append(len(bound.plans))

    work()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
        each.join()
    gc.collect()
    assert [each for each in results if isinstance(each, int)] == [1] * 4
    assert fake.calls["cusparseLtInit"] == 4
    assert fake.calls["cusparseLtDestroy"] == fake.calls["cusparseLtMatmulPlanDestroy"] == 3


# --- what the library refuses


@pytest.mark.parametrize(
    "function",
    ["cusparseLtInit", "cusparseLtStructuredDescriptorInit", "cusparseLtDenseDescriptorInit", "cusparseLtMatmulDescriptorInit",
     "cusparseLtMatmulDescSetAttribute", "cusparseLtMatmulAlgSelectionInit", "cusparseLtMatmulPlanInit", "cusparseLtMatmulGetWorkspace"],
)  # fmt: skip
@LAYOUTS
def test_where_no_plan_can_be_made_torch_multiplies_and_what_was_made_is_given_back(
    functions: Any, by_torch: Any, function: str, rows: bool, caplog: Any
) -> None:
    caplog.set_level("INFO")
    weight, x, bias = sparse(32, 48), torch.randn(13, 48).half(), torch.randn(32).half()
    functions.refuses.add(function)
    for _ in range(2):
        y = cslt_linear(x, pack(weight), bias, 32, 48, 0, rows, "relu")
        torch.testing.assert_close(y, functional.linear(x, weight, bias).relu(), **CLOSE)
        assert y.stride() == ((32, 1) if rows else (1, 16))
    assert len(by_torch) == 2
    assert functions.calls[function] == 1  # it is remembered
    assert not [facts for facts in functions.live.values() if "numbers" in facts or "order" in facts]
    assert f"{function} of cuSPARSELt 800 says CUSPARSE_STATUS_NOT_SUPPORTED" in caplog.text


def test_8_bits_fall_back_as_well(functions: Any, by_torch: Any) -> None:
    functions.refuses.add("cusparseLtMatmulPlanInit")
    weight, x = sparse(64, 32), torch.randn(21, 32).half()
    y, wanted = cslt_linear_int8(x, *pack_int8(weight), None, 32, True), functional.linear(x, weight)
    assert float((y - wanted).norm()) < 0.03 * float(wanted.norm())
    assert len(by_torch) == 1


def test_an_algorithm_that_has_no_plan_for_these_sizes_gives_way_to_the_librarys_own_choice(
    functions: Any, by_torch: Any
) -> None:
    weight, x = sparse(32, 48), torch.randn(16, 48).half()
    y = multiply(pack(weight), x, None, 32, rows=True, algorithm=REFUSED)
    torch.testing.assert_close(y, functional.linear(x, weight), **CLOSE)
    assert [launch["numbers"] for launch in functions.launches] == [{}]
    assert by_torch == []


def test_a_launch_that_fails_is_an_error_with_the_call_its_status_and_the_sizes(functions: Any) -> None:
    packed, x = pack(sparse(32, 48)), torch.randn(16, 48).half()
    with pytest.raises(
        NMError, match=r"cusparseLtMatmul .* says CUSPARSE_STATUS_NOT_SUPPORTED for .*out=32, inputs=48, tokens=16"
    ):
        multiply(packed, x, None, 32, rows=True, algorithm=FAILING)


def test_torch_is_given_the_slices_of_an_algorithm_too(by_torch: Any) -> None:
    packed, x = pack(sparse(32, 48)), torch.randn(16, 48).half()
    for code in (3, Algorithm(3, split=2).code, Algorithm(3, split=2, mode=1).code):
        multiply(packed, x, None, 32, rows=True, algorithm=code)
    given = [(call["alg_id"], call.get("split_k"), call.get("split_k_mode")) for call in by_torch]
    assert given == [(3, None, None), (3, 2, -1), (3, 2, 1)]


# --- the search


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, functions: FakeFunctions) -> dict[int, float]:
    """Seconds by configuration of whatever was launched last, 1 for those that are not named; None is the library's choice."""
    seconds: dict[Any, float] = {}

    def timed(work: Any, device: Any) -> float:
        work()
        numbers = functions.launches[-1]["numbers"]
        return seconds.get((numbers.get(0), numbers.get(3, 0)), seconds.get(numbers.get(0), 1.0))

    monkeypatch.setattr(trials, "_seconds", timed)
    monkeypatch.setattr(searching, "binding", op.binding)
    return seconds


def searched(rows: bool = True, **options: Any) -> int:
    weight, bias = sparse(256, 272), torch.randn(256).half()
    return search(weight, pack(weight), torch.randn(261, 272).half(), bias, rows=rows, **options)


@LAYOUTS
@pytest.mark.parametrize("activation", ["", "relu"])
def test_the_fastest_configuration_with_the_right_numbers_is_taken(
    clock: Any, by_torch: Any, rows: bool, activation: str
) -> None:
    clock.update({2: 0.5, 1: 0.7, WRONG: 0.1, REFUSED: 0.1, FAILING: 0.1})
    assert searched(rows, activation=activation) == 2
    assert by_torch == []


def test_configuration_0_by_name_is_not_the_librarys_choice(clock: Any) -> None:
    clock.update({0: 0.5})
    assert Algorithm.of(searched()) == (0, 1, 0)


def test_the_librarys_choice_stays_where_nothing_beats_it_by_more_than_noise(clock: Any) -> None:
    clock.update({2: 0.99})
    assert searched() == 0


def test_slices_of_the_reduction_axis_are_tried_if_asked_for(clock: Any) -> None:
    clock.update({2: 0.5, (2, 4): 0.3})
    assert searched() == 2
    assert Algorithm.of(searched(splits=(2, 4))) == (2, 4, 1)


def test_without_a_clock_of_its_own_a_device_is_timed_by_the_wall(functions: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(searching, "binding", op.binding)
    assert Algorithm.of(searched()).config not in (WRONG, REFUSED, FAILING)


def test_where_there_is_no_plan_nothing_is_found(functions: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(searching, "binding", op.binding)
    functions.refuses.add("cusparseLtMatmulPlanInit")
    assert searched() == 0


# --- the pass


class Net(nn.Module):
    """Activations that are a product's own, one that something else reads too, and one behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        x = torch.relu(self.first(x))
        x = self.second(x).relu_()
        y = self.third(x)
        return torch.relu(y) + y


def lowered(**options: Any) -> tuple[nn.Module, Any]:
    model = Net().eval().half()
    gm, _ = capture_mode(model, (torch.randn(2, 16, 4, 2).half(),), {}, training=False)
    sites = {site.name: site for site in find(model, [gm], PatternMap.parse("2:4"), include=["*"]).sites}
    with torch.no_grad():
        for name in sites:
            model.get_parameter(name).copy_(masked(model.get_parameter(name).float(), pattern="2:4", axis=1))
    options = {"machine": Machine("cuda", (9, 0), 800), "min_tokens": 0} | options
    return model, run(gm, [lambda each: lower_cusparselt(each, sites_by_read=sites, **options)])


def test_a_relu_that_alone_reads_a_product_is_computed_with_it(
    functions: Any, by_torch: Any, monkeypatch: Any, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.setattr(lowering, "binding", op.binding)
    model, gm = lowered()
    for batch in (2, 3):
        x = torch.randn(batch, 16, 4, 2).half()
        found, wanted = gm(x)[0], model(x)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.stride() == wanted.stride()
    assert [launch["attributes"].get(0, 0) for launch in functions.launches] == [1, 1, 1, 0] * 2
    assert by_torch == []
    golden("lower_cusparselt_relu", show_graph(gm))


def test_without_the_library_a_relu_stays_a_node_unless_it_is_asked_for_and_the_numbers_are_the_same(by_torch: Any) -> None:
    model, gm = lowered()
    assert count_relus(gm) == 4
    x = torch.randn(2, 16, 4, 2).half()
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)
    model, gm = lowered(fuse=True)
    assert count_relus(gm) == 1
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)
    assert len(by_torch) == 8


def test_a_relu_can_be_left_a_node(functions: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(lowering, "binding", op.binding)
    assert count_relus(lowered(fuse=False)[1]) == 4


def test_an_algorithm_is_searched_with_the_activation_it_will_run_with(functions: Any, monkeypatch: Any) -> None:
    asked: list[str] = []

    def search(*_: Any, activation: str, **__: Any) -> int:
        asked.append(activation)
        return 2

    monkeypatch.setattr(lowering, "binding", op.binding)
    monkeypatch.setattr(searching, "search", search)
    model, gm = lowered(search=True)
    x = torch.randn(2, 16, 4, 2).half()
    torch.testing.assert_close(gm(x)[0], model(x), **CLOSE)
    assert asked == ["relu", "relu", "relu", ""]
    assert {launch["numbers"][0] for launch in functions.launches} == {2}


def count_relus(gm: Any) -> int:
    return sum(node.target in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default) for node in gm.graph.nodes)


# --- the library itself


def test_the_library_is_called_directly_only_where_the_environment_asks_for_it(monkeypatch: Any) -> None:
    there: Any = object()
    monkeypatch.setattr(direct_module, "_direct", lambda: there)
    for wish, expected in ((None, None), ("", None), ("torch", None), ("direct", there)):
        monkeypatch.delenv("NM_COMPILER_CUSPARSELT", raising=False)
        if wish is not None:
            monkeypatch.setenv("NM_COMPILER_CUSPARSELT", wish)
        assert binding(torch.device("cuda")) is expected
        assert binding(torch.device("cpu")) is None


def test_a_cpu_and_a_torch_without_the_library_have_no_binding(monkeypatch: Any) -> None:
    assert binding(torch.device("cpu")) is None
    found.cache_clear()
    if torch.version.cuda is None:
        assert found() is None


class Version:
    """As ctypes shows a library: functions by name, and one that tells the version."""

    def __init__(self, *parts: int, without: str = "") -> None:
        self.parts, self.without = parts, without

    def __getattr__(self, name: str) -> Any:
        if name == self.without:
            raise AttributeError(name)

        def function(which: Any, value: Any) -> int:
            value._obj.value = self.parts[which.value]
            return 0

        return function


@pytest.mark.parametrize(
    ("parts", "without", "known"),
    [
        ((0, 8, 0), "", 800), ((0, 7, 1), "cusparseLtMatmulAlgSelectionDestroy", 701), ((0, 6, 3), "", 603), ((0, 5, 2), "", None),
        ((0, 9, 0), "", None), ((1, 0, 0), "", None), ((0, 8, 0), "cusparseLtMatmulPlanInit", None),
    ],
)  # fmt: skip
def test_only_versions_with_the_functions_we_know_are_opened(monkeypatch: Any, parts: Any, without: str, known: Any) -> None:
    monkeypatch.setattr(library.ctypes, "CDLL", lambda _: Version(*parts, without=without))
    made = opened("anything")
    assert (made and made.version) == known


def test_a_library_that_is_not_there_or_not_torchs_own_version_is_none(monkeypatch: Any) -> None:
    assert opened("libnothing-of-this-name.so") is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(library.ctypes, "CDLL", lambda _: Version(0, 8, 0))
    for version, wanted in ((800, 800), (701, None), (None, None)):
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda version=version: version)
        found.cache_clear()
        made = found()
        assert (made and made.version) == wanted
    found.cache_clear()


def test_structs_are_zeroed_aligned_apart_and_larger_for_the_versions_that_need_it() -> None:
    structs = Structs(4096, 3)
    assert [address % 64 for address in structs.addresses] == [0, 0, 0]
    assert [b - a for a, b in zip(structs.addresses, structs.addresses[1:], strict=False)] == [4096, 4096]
    assert Library(None, 603).struct >= 13072
    assert Library(None, 800).struct >= 512


def test_a_version_without_a_function_that_destroys_does_without() -> None:
    fake = FakeFunctions()
    plan = Plan(Library(fake, 800), _handle(fake), PROBLEM)
    assert plan.read(HOW_MANY) == CONFIGS
    Library(object(), 603).drop("cusparseLtMatmulAlgSelectionDestroy", 0)
    plan.close()
    plan.close()
    assert fake.calls["cusparseLtMatmulPlanDestroy"] == 1


def _handle(fake: FakeFunctions) -> int:
    structs = Structs(4096, 1)
    fake.cusparseLtInit(structs.addresses[0])
    fake.kept = structs
    return structs.addresses[0]


def test_the_streams_of_torch_are_asked_for_as_numbers(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 40 + device, raising=False)
    assert Direct(Library(FakeFunctions(), 800))._stream(2) == 42
