# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Linears in 8 bits on cuSPARSELt, over the stand-in for the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cusparselt_standin import install, unpacked
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.errors import NMError
from nm_compiler.graph import show_graph
from nm_compiler.runtime.backends import cusparselt as backend
from nm_compiler.runtime.choose import Timing
from nm_compiler.runtime.cusparselt import candidates as candidates_module
from nm_compiler.runtime.cusparselt import measuring
from nm_compiler.runtime.cusparselt.eligible import Machine
from nm_compiler.runtime.cusparselt.int8 import cslt_linear_int8, pack_int8
from nm_compiler.solvers.masks import masked

LAYOUTS = pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    monkeypatch.setenv("NM_COMPILER_CACHE", str(tmp_path))
    for module in (backend, candidates_module):
        monkeypatch.setattr(module, "machine_of", lambda device: Machine("cuda", (9, 0), 802))
    return install(monkeypatch)


def sparse(out: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return masked(torch.randn(out, inputs) / inputs**0.5, pattern="2:4").to(dtype)


def rounded(x: Tensor) -> Tensor:
    """What int8 leaves of a tensor with one scale."""
    step = x.float().abs().max() / 127
    return (x.float() / step).round() * step


def test_a_weight_is_rounded_by_channel_and_keeps_its_zeros(calls: Any) -> None:
    weight = sparse(32, 64)
    weight[3] = 0
    packed, scale = pack_int8(weight)
    assert packed.numel() >= weight.numel() * 10 // 16
    assert packed.dtype == torch.int8
    whole = unpacked(packed, 64)
    assert torch.equal(whole != 0, whole.masked_fill(weight == 0, 0) != 0)
    difference = (whole.float() * scale[:, None] - weight.float()).abs()
    assert bool((difference <= scale[:, None] / 2 + 1e-6).all())
    assert int(whole.abs().amax()) == 127


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 21])
def test_the_product_is_that_of_the_rounded_operands(calls: Any, dtype: torch.dtype, rows: bool, tokens: int) -> None:
    weight, x, bias = sparse(64, 32, dtype), torch.randn(tokens, 32).to(dtype), torch.randn(64).to(dtype)
    packed, scale = pack_int8(weight)
    dense = unpacked(packed, 32).float() * scale[:, None]
    for given in (x, x.t().contiguous().t()):
        for b in (None, bias):
            y = cslt_linear_int8(given, packed, scale, b, 32, rows)
            wanted = functional.linear(rounded(x), dense, None if b is None else b.float())
            torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)
            assert y.stride() == ((64, 1) if rows else (1, -(-tokens // 16) * 16))
    error = (y.float() - functional.linear(x.float(), weight.float(), bias.float())).norm() / y.float().norm()
    assert error < 0.03
    assert all(call["dtype"] == torch.int8 for call in calls)


@LAYOUTS
def test_zero_inputs_no_inputs_and_fake_ones_give_what_they_should(calls: Any, rows: bool) -> None:
    packed, scale = pack_int8(sparse(32, 64))
    assert not cslt_linear_int8(torch.zeros(5, 64).bfloat16(), packed, scale, None, 64, rows).any()
    assert cslt_linear_int8(torch.zeros(0, 64).bfloat16(), packed, scale, None, 64, rows).shape == (0, 32)
    given = torch.randn(21, 64).half(), packed, scale, torch.randn(32).half(), 64, rows
    torch.library.opcheck(torch.ops.nm.cslt_linear_int8, given)
    with FakeTensorMode():
        fake = [torch.empty(given.shape, dtype=given.dtype, device="cuda") for given in (packed, scale)]
        y = cslt_linear_int8(torch.empty(21, 64, dtype=torch.half, device="cuda"), *fake, None, 64, rows)
    assert (y.shape, y.dtype, y.device.type) == ((21, 32), torch.half, "cuda")


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(32, 32), "float16 or bfloat16"),
        (torch.zeros(32, 48).half(), "multiples of 32"),
        (torch.ones(32, 32).half(), "not 2:4"),
    ],
    ids=["float32", "size", "dense"],
)
def test_weights_that_cannot_be_packed_are_refused(calls: Any, weight: Tensor, says: str) -> None:
    with pytest.raises(NMError, match=says):
        pack_int8(weight)
    with pytest.raises(NMError, match=r"takes \[tokens, 64\]"):
        cslt_linear_int8(torch.zeros(2, 32).half(), *pack_int8(sparse(32, 64)), None, 64, True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.odd, self.head = nn.Linear(32, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.down(torch.relu(self.up(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.odd(y)))


@pytest.mark.ci
def test_named_weights_are_lowered_to_8_bits_if_that_was_faster_and_others_are_not(
    calls: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    model, x = Net(), torch.randn(6, 5, 8)
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    given: dict[str, Any] = {"backend": "cusparselt", "dtype": torch.bfloat16}
    really = nm.lower(model, (x,), **given, options={"int8": "up.*"})
    assert {row.name: row for row in nm.report(really).rows}["up.weight"].sparse_ms > 0
    monkeypatch.setattr(measuring, "measure", lambda *_: Timing(2e-3, 1e-3))
    monkeypatch.setattr(measuring, "measure_int8", lambda case, _: Timing(2e-3, 1e-3 if len(case.weight) == 64 else 3e-3))
    monkeypatch.setenv("NM_COMPILER_CACHE", str(tmp_path / "other"))
    lowered = nm.lower(model, (x,), **given, options={"int8": ["up.*", "down.*", "odd.*"]})
    rows = {row.name: row for row in nm.report(lowered).rows}
    assert rows["up.weight"].kernel == "cuSPARSELt, int8"
    assert rows["up.weight"].bytes == 64 * 32 * 10 // 16
    assert rows["down.weight"].reason == "measured 0.67x of dense at 30 tokens"
    assert rows["odd.weight"].kernel == "cuSPARSELt"
    assert "int8: odd.weight: 48 output channels are no multiple of 32: make them 64" in str(nm.report(lowered))
    for batch in (6, 2):
        torch.testing.assert_close(lowered(x[:batch]).float(), model(x[:batch]), rtol=0.2, atol=0.1)
    running = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(running(x), lowered(x))
    golden("lower_int8_net", show_graph(lowered.run))
