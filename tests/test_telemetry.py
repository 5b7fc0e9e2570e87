# mypy: disable-error-code="arg-type,assignment,attr-defined,index,no-untyped-call,operator,union-attr"
"""Telemetry: every number against its definition."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, Grouped, example
from precompiled import precompiled

import nm_compiler as nm
from nm_compiler.state.beside import Weight
from nm_compiler.telemetry import flat


def compiled(method: Any, kind: Any = ConvNet) -> tuple[nm.SparseModule, Any]:
    torch.manual_seed(0)
    return precompiled(kind(), method)


def test_a_row_comes_every_so_many_steps_and_is_plain_numbers() -> None:
    sparse, _ = compiled(nm.LBC())
    scheduler, telemetry = nm.SparsityScheduler(sparse, total_steps=9), nm.Telemetry(sparse, every=3)
    rows = []
    for _ in range(9):
        scheduler.step()
        rows.append(telemetry.step())
    assert [row and row["step"] for row in rows] == [None, None, 3, None, None, 6, None, None, 9]
    first, last = rows[2], rows[8]
    assert json.loads(json.dumps(last)) == last
    assert set(last["weights"]) == {"conv1.weight", "conv2.weight"}
    assert first["total"]["flipped"] is None
    assert first["total"]["live"] == 1 + 1  # 1 + ceil(5 (2 / 5)^3), of six
    assert last["total"]["live"] == 1
    assert last["total"]["nonzero"] == 0.5
    assert last["total"]["backward_kept"] is None
    assert flat(last)["conv1.weight/live"] == 1
    assert "total/backward_kept" not in flat(last)


@pytest.mark.ci(here=["Grouped"])
@pytest.mark.parametrize("kind", [ConvNet, Grouped])
@pytest.mark.parametrize("method", [nm.BiMask(interval=1, moves=20), nm.SRSTE(), nm.LBCBiMask()], ids=str)
def test_numbers_are_what_their_definitions_say(method: Any, kind: Any) -> None:
    sparse, _ = compiled(method, kind)
    telemetry = nm.Telemetry(torch.compile(sparse, backend="eager"), every=1)
    before = {w.site.name: sparse.masked(w.site.name)[0] != 0 for w in sparse.weights}
    telemetry.step()
    with torch.no_grad():
        for weight in sparse.weights:
            weight.param.add_(torch.randn_like(weight.param), alpha=0.1)
    row = telemetry.step()
    kept = gone = whole = size = used = flips = behind = forward_of_both = square_of_both = 0.0
    for weight in sparse.weights:
        name, found = weight.site.name, row["weights"][weight.site.name]
        forward, backward = sparse.masked(name)
        w = weight.param.detach()
        flipped = (before[name] != (forward != 0)).double()
        assert found["retained"] == pytest.approx(float(forward.abs().sum() / w.abs().sum()), rel=1e-5)
        assert found["nonzero"] == pytest.approx(float((forward != 0).double().mean()))
        assert found["flipped"] == pytest.approx(float(flipped.mean()))
        whole, kept, size = whole + float(w.abs().sum()), kept + float(forward.abs().sum()), size + w.numel()
        used, flips = used + float((forward != 0).sum()), flips + float(flipped.sum())
        if backward is None:
            assert found["backward_kept"] is found["gradient_gap"] is None
            continue
        gap = float((forward - backward).square().sum())
        assert found["backward_kept"] == pytest.approx(float(backward.abs().sum() / forward.abs().sum()), rel=1e-5)
        assert found["gradient_gap"] == pytest.approx(gap / float(forward.square().sum()), rel=1e-5)
        behind, gone = behind + float(backward.abs().sum()), gone + gap
        forward_of_both, square_of_both = (
            forward_of_both + float(forward.abs().sum()),
            square_of_both + float(forward.square().sum()),
        )
    total = row["total"]
    assert total["retained"] == pytest.approx(kept / whole, rel=1e-5)
    assert total["nonzero"] == pytest.approx(used / size)
    assert total["flipped"] == pytest.approx(flips / size)
    assert (flips > 0) == (not isinstance(method, nm.LBC))
    if isinstance(method, nm.SRSTE):
        assert total["backward_kept"] is None
    else:
        assert total["backward_kept"] == pytest.approx(behind / forward_of_both, rel=1e-5)
        assert total["gradient_gap"] == pytest.approx(gone / square_of_both, rel=1e-5)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_an_interval_that_is_no_positive_number_is_refused(every: Any) -> None:
    with pytest.raises(nm.NMError, match="Telemetry"):
        nm.Telemetry(compiled(nm.SRSTE())[0], every=every)


def test_telemetry_in_a_checkpoint_goes_on_with_its_steps_and_flips(tmp_path: Path) -> None:
    def run(parts: dict[str, Any], count: int) -> list[Any]:
        rows = []
        for _ in range(count):
            parts["optimizer"].zero_grad()
            parts["model"](example(ConvNet(), batch=4)).square().sum().backward()
            parts["optimizer"].step()
            rows.append(parts["telemetry"].step())
        return rows

    def parts() -> dict[str, Any]:
        sparse, _ = compiled(nm.SRSTE())
        sparse.eval()
        return {
            "model": sparse,
            "optimizer": torch.optim.SGD(sparse.parameters(), lr=0.3),
            "telemetry": nm.Telemetry(sparse, every=3),
        }

    straight, first, second = parts(), parts(), parts()
    expected = run(straight, 9)
    assert expected[5]["total"]["flipped"] > 0
    got = run(first, 4)
    nm.save_checkpoint(tmp_path / "run.pt", **first)
    run(second, 2)
    nm.load_checkpoint(tmp_path / "run.pt", **second)
    assert got + run(second, 5) == expected


def test_telemetry_of_another_model_is_refused_and_changes_nothing() -> None:
    telemetry = nm.Telemetry(compiled(nm.SRSTE())[0], every=1)
    telemetry.step()
    before = telemetry.state_dict()
    other = nm.Telemetry(compiled(nm.SRSTE(), Grouped)[0], every=1)
    other.step()
    smaller = {"last_step": 5, "before": {"conv1.weight": torch.zeros(1, dtype=torch.uint8)}}
    cases: Any = (({}, "before, last_step missing"), (other.state_dict(), "grouped.weight is not sparse in this one"))
    for state, message in (*cases, (smaller, r"conv1.weight has shape \[.*\] in this one")):
        with pytest.raises(nm.NMError, match=message):
            telemetry.load_state_dict(state)
        assert telemetry.state_dict() == before


@dataclass(frozen=True, slots=True)
class Counting(nm.SRSTE):
    key: str = "largest"

    def numbers(self, weight: Weight) -> dict[str, float]:
        return {self.key: float(weight.value.abs().max())}


def test_a_method_adds_numbers_of_its_own_to_the_row_of_every_weight_but_none_that_hide_others() -> None:
    model = MLP()
    telemetry = nm.Telemetry(nm.compile(model, example(model), method=Counting()), every=1)
    row = telemetry.step()
    assert row is not None
    assert row["weights"]["fc2.weight"]["largest"] == float(model.fc2.weight.detach().abs().max())
    assert "fc2.weight/largest" in flat(row)
    hiding = nm.Telemetry(nm.compile(MLP(), example(MLP()), method=Counting(key="live")))
    with pytest.raises(nm.NMError, match=r"numbers\(\) of the method gives 'live' for fc2.weight"):
        hiding.measure()
