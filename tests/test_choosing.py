# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Sparse or dense: measured once a shape, kept on disk, and the faster one runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cusparselt_standin import install
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.runtime.backends import cusparselt as backend
from nm_compiler.runtime.choose import Choices, Timing, key_of, side_by_side
from nm_compiler.runtime.cusparselt import candidates as candidates_module
from nm_compiler.runtime.cusparselt import measuring, search
from nm_compiler.runtime.cusparselt.eligible import Machine
from nm_compiler.runtime.cusparselt.measuring import Case, Ways

GPU = Machine("cuda", (9, 0), 802)


class Net(nn.Module):
    """Two sizes of linears, one of them twice, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
        self.again, self.odd = nn.Linear(32, 64), nn.Linear(64, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.narrow(torch.relu(self.wide(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.odd(torch.relu(self.again(y)))))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The library's calls by a stand-in, on a machine that says it is an H100, with a cache of its own."""
    monkeypatch.setenv("NM_COMPILER_CACHE", str(tmp_path))
    for module in (backend, candidates_module):
        monkeypatch.setattr(module, "machine_of", lambda device: GPU)
    return install(monkeypatch)


def frozen() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 5, 8)
    return nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval(), x


def timings(monkeypatch: pytest.MonkeyPatch, fast: set[int]) -> list[tuple[int, ...]]:
    """Packed products with so many outputs are twice as fast, others twice as slow. Returns what was measured."""
    measured: list[tuple[int, ...]] = []

    def measure(case: Case, ways: Ways) -> Timing:
        measured.append((*case.weight.shape, *case.sizes))
        return Timing(2e-3, 1e-3) if case.weight.shape[0] in fast else Timing(1e-3, 2e-3)

    monkeypatch.setattr(measuring, "measure", measure)
    return measured


def test_each_distinct_shape_is_measured_once_and_the_faster_one_runs(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = frozen()
    measured = timings(monkeypatch, fast={64})
    lowered = nm.lower(model, (x,), backend="cusparselt", dtype=torch.bfloat16)
    assert sorted(measured) == [(32, 64, 30, 64), (64, 32, 30, 32)], "wide and again share a shape; odd cannot be packed"
    rows = {row.name: row for row in nm.report(lowered).rows}
    assert rows["wide.weight"].status == rows["again.weight"].status == "sparse"
    assert rows["wide.weight"].speedup == 2.0
    assert rows["wide.weight"].bytes == 64 * 32 * 2 * 9 // 16
    assert rows["narrow.weight"].status == "dense"
    assert rows["narrow.weight"].reason == "measured 0.50x of dense at 30 tokens"
    assert (
        rows["narrow.weight"].hint == "options={'graph': True} if it runs in a CUDA graph, more tokens a call, or force=[...]"
    )
    assert rows["odd.weight"].reason == "20 output channels are no multiple of 16: make them 32"
    assert rows["odd.weight"].hint == "make them 32"
    names = [name for name, _ in lowered.named_buffers()]
    assert "run.wide_weight_packed" in names
    assert "run.wide.weight" not in names, "the dense weight is not kept beside the packed one"
    assert "run.narrow.weight" in names
    torch.testing.assert_close(lowered(x).float(), model(x), rtol=0.1, atol=0.05)
    torch.testing.assert_close(lowered(x[:2]).float(), model(x[:2]), rtol=0.1, atol=0.05)


def test_what_was_measured_is_known_the_next_time_and_another_machine_asks_anew(
    calls: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = frozen()
    measured = timings(monkeypatch, fast={64})
    for _ in range(2):
        nm.lower(model, (x,), backend="cusparselt", dtype=torch.float16)
    assert len(measured) == 2
    known = json.loads((tmp_path / "choices.json").read_text())
    assert len(known) == 2
    assert all("weight=(" in key and "torch=" in key and "dtype=torch.float16" in key for key in known)
    nm.lower(model, (x,), backend="cusparselt", dtype=torch.bfloat16)
    assert len(measured) == 4, "another dtype is another product"


def test_forced_weights_run_sparse_unmeasured_and_without_choose_all_with_enough_tokens_do(
    calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = frozen()
    measured = timings(monkeypatch, fast=set())
    lowered = nm.lower(model, (x,), backend="cusparselt", dtype=torch.float16, force=["wide.*", "again.weight"])
    assert {row.name for row in nm.report(lowered).rows if row.status == "sparse"} == {"wide.weight", "again.weight"}
    assert measured == [(32, 64, 30, 64)]
    lowered = nm.lower(model, (x,), backend="cusparselt", dtype=torch.float16, options={"choose": False, "min_tokens": 16})
    assert sum(row.status == "sparse" for row in nm.report(lowered).rows) == 3
    lowered = nm.lower(model, (x,), backend="cusparselt", dtype=torch.float16, options={"choose": False})
    reasons = {row.name: row.reason for row in nm.report(lowered).rows}
    assert "30 tokens, and packed products tend to be slower below 1024" in reasons["wide.weight"]
    assert len(measured) == 1


def test_convolutions_with_taps_run_unfolded_only_where_that_was_measured_to_be_faster(
    calls: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 32, 3, padding="same"), nn.ReLU(), nn.Conv2d(32, 4, 1)
    )  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    model = nm.freeze(nm.compile(net, (x,), method=nm.Magnitude())).eval()
    options: dict[str, Any] = {"backend": "cusparselt", "dtype": torch.bfloat16}
    real = nm.lower(model, (x,), **options)
    assert all(row.dense_ms > 0 for row in nm.report(real).rows if row.name in ("1.weight", "3.weight"))
    monkeypatch.setenv("NM_COMPILER_CACHE", str(tmp_path / "other"))
    timings(monkeypatch, fast={64})
    lowered = nm.lower(model, (x,), **options)
    rows = {row.name: row for row in nm.report(lowered).rows}
    assert rows["1.weight"].kernel == "cuSPARSELt, unfolded"
    assert rows["3.weight"].reason == "measured 0.50x of dense at 50 tokens"
    torch.testing.assert_close(lowered(x).float(), model(x), rtol=0.1, atol=0.05)
    unmeasured = nm.lower(model, (x,), **options, options={"choose": False, "min_tokens": 1})
    assert "3x3 taps, a matrix product only by a copy of 9 times" in str(nm.report(unmeasured))


def test_what_is_timed_is_what_is_lowered_with_an_algorithm_searched_once_for_each_size(
    calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x, searched = torch.randn(9, 8), list[tuple[int, ...]]()
    model = nm.freeze(nm.compile(net, (x,), method=nm.Magnitude())).eval()

    def winner(weight: Tensor, packed: Tensor, x: Tensor, bias: Tensor | None, *, rows: bool, least: int, **_: Any) -> int:
        searched.append((*weight.shape, x.shape[0], least))
        return 3

    def timed(dense: Any, sparse: Any, device: torch.device) -> Timing:
        calls.clear()
        assert sparse().is_contiguous()
        assert [call["alg_id"] for call in calls] == [3]
        return Timing(2e-3, 1e-3)

    monkeypatch.setattr(search, "search", winner)
    monkeypatch.setattr(measuring, "side_by_side", timed)
    options: dict[str, Any] = {"backend": "cusparselt", "dtype": torch.bfloat16}
    lowered = nm.lower(model, (x,), **options, check=False)
    assert searched == [(32, 32, 9, search.SEEN)], "both layers are of one size"
    calls.clear()
    lowered(x)
    assert [call["alg_id"] for call in calls] == [3, 3]
    nm.lower(model, (x,), **options, options={"search": True}, check=False)
    assert searched[1:] == [(32, 32, 9, search.LEAST)], "asked for, small ones are searched as well, and timed anew"
    nm.lower(model, (x,), **options, options={"graph": True}, check=False)
    assert len(searched) == 3, "a CUDA graph is another measurement"
    nm.lower(model, (x,), **options, options={"choose": False, "min_tokens": 1}, check=False)
    assert len(searched) == 3, "nothing is searched unasked where nothing is timed"


def test_a_lowered_model_compiles_whole(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = frozen()
    timings(monkeypatch, fast={32, 64})
    lowered = nm.lower(model, (x,), backend="cusparselt", dtype=torch.bfloat16)
    running = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(running(x), lowered(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_pointwise_convolution_is_measured_as_the_convolution_it_is(calls: Any, channels_last: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 1), nn.Conv2d(64, 16, 1), nn.Conv2d(16, 4, 3))
    x = torch.randn(2, 3, 12, 12)
    model = nm.freeze(nm.compile(net, (x,), method=nm.Magnitude())).eval()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    lowered = nm.lower(model, (x,), backend="cusparselt", dtype=torch.bfloat16)
    rows = {row.name: row for row in nm.report(lowered).rows}
    assert rows["1.weight"].dense_ms > 0
    assert rows["1.weight"].sparse_ms > 0
    assert rows["1.weight"].status == ("sparse" if rows["1.weight"].speedup > 1.02 else "dense")
    forced = nm.lower(model, (x,), backend="cusparselt", dtype=torch.bfloat16, force=["*"])
    assert {row.name for row in nm.report(forced).rows if row.status == "sparse"} == {"1.weight", "2.weight"}
    torch.testing.assert_close(forced(x).float(), model(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"a": 1}', '{"a": {"dense_s": 1}}'])
def test_a_damaged_cache_is_a_slower_start_and_nothing_else(content: str, tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text(content)
    assert Choices(str(file)).find("k", lambda: Timing(2.0, 1.0)).speedup == 2.0
    assert json.loads(file.read_text())["k"] == {"dense_s": 2.0, "sparse_s": 1.0}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "choices.json")
    assert choices.find("k", lambda: Timing(2.0, 1.0)).sparse_wins
    assert choices.find("k", lambda: pytest.fail("measured twice in one run")).sparse_wins


def test_noise_is_no_reason_to_go_sparse_and_timing_tells_a_slow_from_a_fast_function() -> None:
    assert not Timing(1.01, 1.0).sparse_wins
    assert Timing(1.1, 1.0).sparse_wins
    small, large = torch.randn(64, 64), torch.randn(512, 512)
    assert side_by_side(lambda: large @ large, lambda: small @ small, torch.device("cpu")).speedup > 2
    assert "threads" in key_of(torch.device("cpu"), out=3)
    assert key_of(torch.device("cpu"), out=3) != key_of(torch.device("cpu"), out=4)
