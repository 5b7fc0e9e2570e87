# mypy: disable-error-code="assignment,has-type,no-any-return,operator"
"""Models that write to their own state: the lowered one counts by itself, from where the model was, and the model does not move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nm_compiler as nm
from nm_compiler.runtime.native.library import load

packs = pytest.mark.skipif(isinstance(load(), str), reason="no C compiler here")


class Net(nn.Module):
    """Two linears and state."""

    calls: Tensor
    whole: Tensor
    part: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("calls", torch.ones(()))
        self.register_buffer("whole", torch.zeros(8, 16))
        self.register_buffer("part", self.whole[4:])
        self.norm = nn.BatchNorm1d(16)

    def state(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.state(self.first(x))))


class Part(Net):
    def state(self, h: Tensor) -> Tensor:
        self.part[:2] += 1.0
        return h + self.whole[:4] + self.whole[4:]


class Kept(Net):
    def state(self, h: Tensor) -> Tensor:
        self.part = self.part * 0.5 + h
        return self.part.clone()


class Several(Net):
    def state(self, h: Tensor) -> Tensor:
        torch._foreach_add_([self.calls, self.whole], 1.0)
        return h * self.calls + self.whole[:4]


class Means(Net):
    def state(self, h: Tensor) -> Tensor:
        F.batch_norm(h, self.norm.running_mean, self.norm.running_var, training=True)
        return self.norm(h)


class Factor(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(F.linear(x, self.first.weight * self.calls, self.first.bias * self.calls))


class Bias(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.running_mean += 1
        return self.second(F.linear(x, self.first.weight, self.norm.running_mean))


class Folded(Net):
    """A batch norm behind a convolution, over means that move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x[..., None]))[..., 0]
        self.norm.running_mean += 1
        return self.second(h)


class Memory(Net):
    """Data multiplied with a buffer that moves."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x)) @ self.whole.t()
        self.whole += 1
        return h


EVERY = [Net, Part, Kept, Several, Means, Factor, Bias, Folded, Memory]


def pruned(kind: Callable[[], nn.Module], *names: str) -> Any:
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for name in names or ("first.weight", "second.weight"):
            model.get_parameter(name).view(-1, 4)[:, 2:] = 0
    return model


WAYS = [
    *(pytest.param(kind, "dense", None, id=f"{kind.__name__} dense") for kind in EVERY),
    *(pytest.param(kind, "cpu", None, id=f"{kind.__name__} cpu", marks=packs) for kind in EVERY),
    *(pytest.param(kind, "dense", torch.float64, id=f"{kind.__name__} cast") for kind in EVERY if kind is not Part),
]  # a cast gives each view memory of its own


@pytest.mark.parametrize(("kind", "backend", "dtype"), WAYS)
def test_what_a_model_counts_in_its_state_is_counted_apart_by_the_lowered_one(
    kind: type[Net], backend: str, dtype: torch.dtype | None
) -> None:
    model, x = pruned(kind), torch.randn(4, 16)
    for _ in range(2):
        model(x)
    before = copy.deepcopy(model.state_dict())
    lowered = nm.lower(model, (x,), backend=backend, dtype=dtype, force=["*"] if backend == "cpu" else [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "by the check"
    with torch.no_grad():
        other = copy.deepcopy(lowered)
        found = [lowered(x) for _ in range(3)]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "by calls"
        wanted = [model(x) for _ in range(3)]
        again = [other(x) for _ in range(3)]
    for mine, copied, theirs in zip(found, again, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs)
        torch.testing.assert_close(copied, mine)


@packs
def test_timing_the_whole_graph_does_not_count() -> None:
    model, x = pruned(Net), torch.randn(4, 16)
    lowered = nm.lower(model, (x,), backend="cpu")
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x))


class Layered(nn.Module):
    """Two layers that count in the same buffer, which is read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(), Net()
        self.second.calls = self.first.calls

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.first.calls


def test_lowered_parts_count_in_the_same_buffer_and_not_in_the_models() -> None:
    x = torch.randn(4, 16)
    model = pruned(Layered, *(f"{layer}.{weight}.weight" for layer in ("first", "second") for weight in ("first", "second")))
    before = model.first.calls.clone()
    fast: Any = nm.lower_parts(model, ["first", "second"], lambda model: model.second(model.first(x)), backend="dense")
    assert torch.equal(model.first.calls, before)
    with torch.no_grad():
        found = [fast.second(fast.first(x)) for _ in range(3)]
        assert torch.equal(model.first.calls, before)
        wanted = [model.second(model.first(x)) for _ in range(3)]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", [Net, Kept])
def test_an_onnx_file_which_keeps_nothing_between_calls_is_refused_to_what_counts(kind: type[Net], tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'nm_compiler[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'nm_compiler[onnx]'")
    path = tmp_path / "model.onnx"
    with pytest.raises(nm.NMError, match="goes by it in its next call, and an ONNX file keeps nothing"):
        nm.lower(pruned(kind), (torch.randn(4, 16),), backend="onnx", options={"path": path})
    assert not path.exists()


class Shown(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.part = h
        return self.second(h)


def test_an_onnx_file_of_a_model_that_only_shows_what_it_computed_in_a_buffer_is_written(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'nm_compiler[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'nm_compiler[onnx]'")
    path = tmp_path / "model.onnx"
    options = {"path": path}
    nm.lower(pruned(Shown), (torch.randn(4, 16),), backend="onnx", options=options, dynamic_shapes=({},))
    assert path.exists()
