# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""How our kernels lay out packed weights, against bytes that the library wrote on an H200, and when they are trusted."""

from __future__ import annotations

import json
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_packing import pack_plainly
from torch import Tensor

from nm_compiler.runtime.cusparselt import compress as module
from nm_compiler.runtime.cusparselt.compress import compress, writes_as_library
from nm_compiler.runtime.cusparselt.layout import packed_shape
from nm_compiler.solvers.masks import masked

SEEN = json.loads(Path(__file__).with_name("cusparselt_layout.json").read_text())


def stored(text: str, dtype: type = np.uint8) -> Tensor:
    return torch.from_numpy(np.frombuffer(b64decode(text), dtype).copy())


def given(case: dict[str, Any]) -> Tensor:
    """Where the weight that the library packed has non-zeros, bool."""
    bits = np.unpackbits(stored(case["given"]).numpy())
    return torch.from_numpy(bits).bool().view(case["shape"])


def test_a_packed_weight_is_what_the_library_wrote_byte_by_byte() -> None:
    case = SEEN["whole"]
    weight = torch.zeros(case["shape"], dtype=torch.int16)
    weight[given(case)] = stored(case["values"], np.int16)
    packed = pack_plainly(weight.view(torch.bfloat16))
    assert packed.shape == packed_shape(*case["shape"])
    assert torch.equal(packed.view(torch.uint8).flatten(), torch.cat((stored(case["kept"]), stored(case["places"]))))


def test_groups_with_fewer_than_two_non_zeros_are_filled_up_as_the_library_does() -> None:
    case = SEEN["fewer"]
    groups = given(case).unflatten(1, (-1, 4))
    assert set(groups.sum(-1).unique().tolist()) == {0, 1, 2}
    packed = pack_plainly(groups.flatten(1).half())
    assert torch.equal(packed.view(torch.uint8).flatten()[groups.numel() :], stored(case["places"]))


# --- whom to trust


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU and a library, both made up. ``packs``: what the library does; ``calls``: how often each of the two packed."""
    made = SimpleNamespace(packs=pack_plainly, ours=0, theirs=0, capturing=False)

    def ours(weight: Tensor) -> Tensor:
        made.ours += 1
        return pack_plainly(weight)

    def theirs(weight: Tensor) -> Tensor:
        made.theirs += 1
        return made.packs(weight)

    monkeypatch.setattr(module, "_agrees", {})
    monkeypatch.setattr(module, "on_gpu", lambda weight: True)
    monkeypatch.setattr(module, "_capturing", lambda: made.capturing)
    monkeypatch.setattr(module, "_kernels", lambda: SimpleNamespace(packed=ours))
    monkeypatch.setattr(torch, "_cslt_compress", theirs)
    return made


def weight_of(out: int = 64, inputs: int = 128, dtype: torch.dtype = torch.half) -> Tensor:
    return masked(torch.randn(out, inputs).to(dtype), pattern="2:4")


def test_where_all_bytes_agree_our_kernel_packs_and_the_library_is_asked_once(library: SimpleNamespace) -> None:
    for dtype in (torch.half, torch.bfloat16):
        weight = weight_of(dtype=dtype)
        assert torch.equal(compress(weight.t().contiguous().t()), pack_plainly(weight))
    assert (library.ours, library.theirs) == (3, 1)


def test_a_library_that_lays_out_weights_otherwise_packs_them_itself(library: SimpleNamespace) -> None:
    for other in (lambda weight: pack_plainly(weight).flip(1), lambda weight: pack_plainly(weight).flatten()):
        library.packs, library.ours = other, 0
        module._agrees.clear()
        weight = weight_of()
        assert torch.equal(compress(weight), other(weight))
        assert library.ours == 1


def test_other_sizes_and_calls_under_capture_are_left_to_the_library(library: SimpleNamespace) -> None:
    library.packs = lambda weight: weight
    for weight in (weight_of(80, 64), weight_of(64, 48), weight_of(dtype=torch.float32)):
        assert not writes_as_library(weight)
        assert compress(weight) is not None
    library.packs, library.capturing = pack_plainly, True
    assert not writes_as_library(weight_of())
    library.capturing = False
    assert writes_as_library(weight_of())
    library.capturing = True
    assert writes_as_library(weight_of())


def test_off_a_gpu_the_library_is_called() -> None:
    assert not writes_as_library(weight_of())
