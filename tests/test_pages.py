# mypy: disable-error-code="arg-type,index,operator,union-attr"
"""Packed weights in huge pages: the same numbers, side by side, saved and copied like any others."""

from __future__ import annotations

import copy
import gc
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.runtime.native import pages
from nm_compiler.runtime.native.library import load

pytestmark = [
    pytest.mark.skipif(isinstance(load(), str), reason=f"no CPU kernels here: {load()}"),
    pytest.mark.skipif(not pages.granted(), reason="this system has no huge pages"),
]


class Shared(nn.Module):
    """Three weights, one of which two products read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 8, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.third(self.second(torch.relu(self.second(torch.relu(self.first(x))))))


@pytest.fixture
def model() -> nn.Module:
    return nm.freeze(nm.compile(Shared(), (torch.randn(3, 24),), method=nm.Magnitude(), include=["*"])).eval()


def lowered(model: nn.Module, **options: Any) -> Any:
    return nm.lower(model, (torch.randn(3, 24),), backend="cpu", force=["*"], options=options)


def packed(lowered: Any) -> dict[str, Tensor]:
    parts = ("values", "codes", "scales")
    return {name: value for name, value in lowered.state_dict().items() if name.rpartition("_")[2] in parts}


def side_by_side(values: dict[str, Tensor]) -> bool:
    """Whether one begins in the cache line behind which another ends."""
    places = sorted({(value.data_ptr(), value.data_ptr() + value.nbytes) for value in values.values()})
    return all(0 <= begin - end < 64 for (_, end), (begin, _) in itertools.pairwise(places))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that small weights fill."""
    monkeypatch.setattr(pages, "PAGE", 4096)


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8"])
def test_weights_lie_one_behind_the_other_from_the_start_of_a_page_on(
    model: nn.Module, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = packed(lowered(model, values=values))
    assert not side_by_side(apart), "less than a page is left alone"
    monkeypatch.setattr(pages, "PAGE", 1024)
    together = packed(lowered(model, values=values))
    assert {name: (value.dtype, value.shape) for name, value in together.items()} == {
        name: (value.dtype, value.shape) for name, value in apart.items()
    }
    assert all(torch.equal(value, apart[name]) for name, value in together.items())
    assert min(value.data_ptr() for value in together.values()) % 1024 == 0
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in together.values()), "a storage for each"
    assert side_by_side(together)
    parts = {value.data_ptr() for value in together.values()}
    assert len(parts) == 3 * (3 if values == "int8" else 2), "what two products share lies there once"


def test_it_computes_the_same_after_copies_and_round_trips(model: nn.Module, small: None) -> None:
    one, x = lowered(model), torch.randn(7, 24)
    wanted = model(x)
    torch.testing.assert_close(one(x), wanted, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(one)
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    assert not twin(x).any()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    assert torch.equal(twin(x), one(x))
    torch.testing.assert_close(one(x), wanted, rtol=1e-5, atol=1e-5)


def test_safetensors_takes_every_part_for_itself(model: nn.Module, small: None, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install -e '.[safetensors]'")
    one = lowered(model)
    unique = {value.data_ptr(): (name, value) for name, value in one.state_dict().items()}
    safetensors.save_file(dict(unique.values()), tmp_path / "packed.safetensors")
    read = safetensors.load_file(tmp_path / "packed.safetensors")
    assert all(torch.equal(value, read[name]) for name, value in unique.values())


def test_a_mapping_lives_as_long_as_a_tensor_in_it(small: None) -> None:
    memory, place = pages.mapping(1 << 20)
    part = pages.tensor_in(memory, place, torch.empty(100, dtype=torch.int32))
    del memory
    gc.collect()
    part.fill_(7)
    assert part.sum() == 700


@pytest.mark.parametrize("switch", ["always madvise [never]", None])
def test_without_huge_pages_nothing_is_moved(
    model: nn.Module, small: None, switch: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    file = tmp_path / "enabled"
    if switch is not None:
        file.write_text(switch)
    monkeypatch.setattr(pages, "_SWITCH", file)
    assert not side_by_side(packed(lowered(model)))
