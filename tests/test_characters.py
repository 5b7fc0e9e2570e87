# mypy: disable-error-code="arg-type,assignment,attr-defined,func-returns-value,index,no-untyped-call,operator,union-attr"
"""The character model: its text, its runs and its table; and the ablations on digits."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import ablation
import characters
import cifar10_table
import pytest
import torch
from ablations import orders, retirement
from ablations.digits import Training
from networks import GPT
from reproduction.grid import LATE, METHODS, Cell
from reproduction.language import Predicting, TextRecipe, network
from reproduction.text import HELD_OUT, SYMBOLS, Text, standard_library

import nm_compiler as nm
from nm_compiler.demo.data import digits

CPU = torch.device("cpu")
TINY = TextRecipe(steps=10, batch=2, context=16, width=32, depth=1, heads=2, lr=1e-2, interval=3, windows=6)
FLAGS = [
    "--batch", "2", "--context", "16", "--width", "32", "--depth", "1", "--heads", "2", "--windows", "6", "--steps", "4",
    "--device", "cpu", "--seeds", "1",
]  # fmt: skip


def read(symbols: torch.Tensor) -> str:
    return "".join(SYMBOLS[symbol] for symbol in symbols.tolist())


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of a few lines; each module says its own name."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for name in (*HELD_OUT, "abc.py", "ast.py", "zipapp.py", "notofpython.py"):
        (folder / name).write_text(f'"""{name}"""\n' + "x = 1\n" * 30)
    return folder


@pytest.fixture
def text(library: Path) -> Text:
    return standard_library(library)


def trained(text: Text, method: str, pattern: str = "2:4", seed: int = 0) -> tuple[Predicting, dict[str, Any]]:
    cell = Cell(TINY.model, method, "" if method == "dense" else pattern, seed)
    run = Predicting(cell, TINY, text, CPU)
    return run, run.train()


def test_the_text_is_the_same_again_and_no_held_out_file_is_trained_on(text: Text, library: Path) -> None:
    again = standard_library(library)
    assert torch.equal(text.train, again.train)
    assert torch.equal(text.held, again.held)
    assert text.digest == again.digest
    train, held = read(text.train), read(text.held)
    assert [name for name in ("abc.py", "ast.py", "zipapp.py") if name in train] == ["abc.py", "ast.py", "zipapp.py"]
    assert not any(name in train for name in HELD_OUT)
    assert all(name in held for name in HELD_OUT)
    assert "notofpython" not in train + held


def test_the_library_of_this_python_has_enough_text_and_every_held_out_file() -> None:
    found = standard_library()
    assert len(found.train) > 2_000_000
    assert len(found.held) > 300_000
    assert int(found.train.max()) < len(SYMBOLS)
    assert "class ArgumentParser(" in read(found.held)
    assert {name.removesuffix(".py") for name in HELD_OUT} <= sys.stdlib_module_names


def test_what_is_not_ascii_is_a_question_mark(library: Path) -> None:
    (library / "abc.py").write_bytes("# -*- coding: latin-1 -*-\n# né\tx\n".encode("latin-1"))
    assert "# n??x\n" in read(standard_library(library).train)


def test_a_library_without_its_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(nm.NMError, match=r"has no argparse\.py, calendar\.py"):
        standard_library(tmp_path)


def test_every_symbol_is_asked_for_what_follows_it_and_a_seed_gives_the_same_windows(text: Text) -> None:
    symbols, following = next(text.batches(1, 3, 16, seed=0))
    assert symbols.shape == (3, 16)
    assert torch.equal(symbols[:, 1:], following.view(3, 16)[:, :-1])
    assert all(read(row) in read(text.train) for row in symbols)
    assert torch.equal(symbols, next(text.batches(1, 3, 16, seed=0))[0])
    assert not torch.equal(symbols, next(text.batches(1, 3, 16, seed=1))[0])


@pytest.mark.parametrize("count", [1, 3, 10_000])
def test_no_held_out_character_is_asked_for_twice(count: int) -> None:
    text = Text(torch.zeros(99, dtype=torch.uint8), torch.arange(250, dtype=torch.uint8), "")
    windows = text.windows(count, 16)
    assert windows.shape == (min(count, 249 // 16), 17)
    assert windows[:, 1:].unique().numel() == windows[:, 1:].numel()
    assert windows.max() < 250


def test_the_model_does_not_see_what_comes_later() -> None:
    model = network(TINY, 0)
    symbols = torch.randint(len(SYMBOLS), (2, 16))
    changed = symbols.clone()
    changed[:, 9:] = 0
    before, after = (model(some).view(2, 16, -1) for some in (symbols, changed))
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_every_method_starts_at_the_same_weights_and_another_seed_at_others() -> None:
    first, again, other = (network(TINY, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert isinstance(network(TINY, 0), GPT)


@pytest.mark.ci(here=["[lbc", "[bimask", "[dense"])
@pytest.mark.parametrize("pattern", ["2:4", "1:16"])
@pytest.mark.parametrize("method", ["dense", "magnitude", "srste", "lbc", "bimask"])
def test_a_run_ends_exactly_n_m_and_tests_the_frozen_model(method: str, pattern: str, text: Text) -> None:
    run, found = trained(text, method, pattern)
    assert found["exact"] == ([0, 0] if method == "dense" else [4, 4])  # qkv, proj, fc1, fc2
    assert found["sparse_weights"] == (0 if method == "dense" else 12 * 32 * 32)
    assert found["bits"] == run.bits(run.model) == found["curve"][-1][1]
    assert [step for step, _ in found["curve"]] == [step for step, _ in found["losses"]] == [2, 4, 6, 8, 10]
    assert 0 < found["bits"] < math.log2(len(SYMBOLS)) + 1
    assert (found["one_shot"] is not None) == (method in LATE)
    assert (found["backward_kept"] is not None) == (method == "bimask")
    assert [live for _, live in found["live"]][-1:] == ([1.0] if method == "lbc" else [])
    assert found["text"] == text.digest
    assert found["python"] == sys.version.split()[0]
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_grid_can_train_it(method: str, text: Text) -> None:
    assert trained(text, method)[1]["exact"] == ([0, 0] if method == "dense" else [4, 4])


def test_a_run_is_the_same_again(text: Text) -> None:
    first, again = (trained(text, "lbc")[1] for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_the_rate_rises_and_falls_and_does_so_twice_where_the_model_is_pruned_half_way(text: Text) -> None:
    recipe = TextRecipe(warm=0.2)
    rates = [recipe.rate(step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    seen: list[float] = []
    run = Predicting(Cell(TINY.model, "magnitude", "2:4", 0), TINY, text, CPU)
    step = run._step
    run._step = lambda symbols, following, rate: seen.append(rate) or step(symbols, following, rate)
    run.train()
    assert seen == [TINY.rate(step, 5) for step in range(5)] * 2


def test_a_loss_that_is_not_finite_stops_the_run_and_the_others_go_on(
    tmp_path: Path, text: Text, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(characters, "standard_library", lambda: text)
    finite = Predicting._finite
    monkeypatch.setattr(
        Predicting, "_finite", lambda run, loss: finite(run, loss * (math.nan if run.cell.method == "srste" else 1))
    )
    assert characters.main([*FLAGS, "--methods", "srste", "lbc", "--patterns", "2:4", "--out", str(tmp_path / "r")]) == 1
    assert "gpt1x32-srste-2of4-seed0 FAILED: gpt1x32-srste-2of4-seed0: the loss is nan: lower --lr" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["gpt1x32-lbc-2of4-seed0.json"]


def test_runs_that_are_there_are_skipped_and_the_table_shows_bits(
    tmp_path: Path, text: Text, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(characters, "standard_library", lambda: text)
    folder = tmp_path / "r"
    flags = [*FLAGS, "--patterns", "2:4", "--out", str(folder), "--methods", "dense"]
    assert characters.main(flags) == 0
    first = (folder / "gpt1x32-dense-seed0.json").read_text()
    assert characters.main([*flags, "bimask"]) == 0
    assert "1 of 2 runs" in capsys.readouterr().out
    assert (folder / "gpt1x32-dense-seed0.json").read_text() == first
    assert sorted(file.name for file in folder.iterdir()) == ["gpt1x32-bimask-2of4-seed0.json", "gpt1x32-dense-seed0.json"]
    runs = cifar10_table.load(folder)
    head, _, titles, _, dense, bimask = cifar10_table.table(runs, "gpt1x32").splitlines()
    assert head.startswith(
        "**gpt1x32**, bits per character, lower is better: 4 steps of 2 x 16 characters, fp32, seeds: 1, cpu"
    )
    assert titles == "| | 2:4 |"
    bits = {key[2]: group[0]["bits"] for key, group in runs.items()}
    assert dense == f"| dense | {bits['dense']:.3f} |"
    assert bimask == f"| Bi-Mask | {bits['bimask']:.3f} ({bits['bimask'] - bits['dense']:+.3f}) |"
    pytest.importorskip("matplotlib")
    cifar10_table.plot(runs, "gpt1x32", folder / "curves.svg")
    assert "bits per character" in (folder / "curves.svg").read_text()


# -- ablations -------------------------------------------------------------------------------------------------------------


def short(**change: Any) -> Training:
    return Training(digits(256), epochs=7, **change)


@pytest.mark.ci
def test_a_search_keeps_more_than_random_orders_do_and_these_more_than_none() -> None:
    searched, drawn, none = (
        orders.measure(short(), variant, 5, "1:4", 0)
        for variant in ("search, by count", "best of 100 random, by count (paper)", "none")
    )
    assert 1 > searched["count_kept"] > drawn["count_kept"] > none["count_kept"] > 0.25
    assert 0 < searched["gap"] < none["gap"] < 1
    assert 0 < searched["accuracy"] <= 1


@pytest.mark.ci
def test_without_momentum_and_decay_the_released_retirement_is_for_good_too() -> None:
    plain = short(momentum=0.0, weight_decay=0.0, lr=0.02)
    found = [retirement.measure(plain, variant, "2:4", 1.0, 0) for variant in retirement.VARIANTS[1:]]
    assert found[0] == found[1]
    assert found[1]["revived"] == 0


@pytest.mark.ci
def test_what_retired_for_good_never_comes_back_and_what_was_released_does_once_scores_are_near_zero() -> None:
    found = {variant: retirement.measure(short(), variant, "2:4", 1e-3, 0) for variant in retirement.VARIANTS}
    assert [found[variant]["revived"] > 0 for variant in retirement.VARIANTS] == [False, False, True]


def test_what_comes_back_is_counted() -> None:
    flips = retirement.Flips()
    scores = torch.tensor([[0.5, -0.25]])
    for live, mask in (([1, 1], [1, 1]), ([1, 0], [1, 0]), ([0, 1], [0, 1]), ([0, 1], [0, 1])):
        flips.see("w", torch.tensor([live]).bool(), torch.tensor([mask]).bool(), scores)
    assert flips.as_json() == {"revived": 100, "restored": 100, "removed": 200, "returned_won": 1.0, "lowest": -0.25}


@pytest.mark.slow
def test_the_ablations_table_shows_means_and_spreads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ablation.json"
    ablation.main(["--quick", "--only", "retirement", "--patterns", "1:4", "--threads", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["retirement"]
    assert [row["case"] for row in rows][:3] == [f"SGD, {each}" for each in retirement.VARIANTS]
    twice = [{**row, "seed": seed, "accuracy": 0.5 + 0.1 * seed} for row in rows for seed in (0, 1)]
    lines = ablation.markdown("retirement", twice).splitlines()
    assert len(lines) == 2 + len(rows) == 7
    assert lines[2].startswith("| 1:4, SGD, for good | 0.0 ± 0.0 | 0.0 ± 0.0 |")
    assert lines[2].endswith("| 55.00 ± 7.07 |")
    capsys.readouterr()
    ablation.main(["--markdown", "--out", str(out)])
    assert capsys.readouterr().out.startswith("| retirement | revived, per 100 groups |")
