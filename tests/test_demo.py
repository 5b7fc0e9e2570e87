"""The demo: its data, its race and its page."""

from __future__ import annotations

import html
import io
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nm_compiler import NMError, Pattern, cli
from nm_compiler.demo import cifar, page, train, words
from nm_compiler.demo.data import augmented, batches, digits, load
from nm_compiler.demo.models import build
from nm_compiler.demo.results import Outcome
from nm_compiler.demo.settings import DENSE, METHODS, Entry, Settings, choose
from nm_compiler.demo.train import run, schedule
from nm_compiler.methods.bimask import BiMask
from nm_compiler.solvers.backward_order import quick_search

COLORS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (90, 90, 90), (240, 240, 10), (0, 0, 0)]


def _npz(path: Path, **changes: object) -> Path:
    files = []
    for color in COLORS:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), color).save(file, "JPEG", quality=95)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    arrays = {
        "jpeg": np.concatenate(files),
        "offsets": np.cumsum([0, *map(len, files)], dtype=np.int64),
        "labels": np.arange(6, dtype=np.uint8),
        "n_train": np.array(4),
    }
    np.savez(path, **(arrays | changes))  # type: ignore[arg-type]
    return path


def _python_batches(folder: Path) -> Path:
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [3, 7]}, protocol=2))
    return folder


# -- data ----------------------------------------------------------------------------------------------------------------


def test_an_npz_of_jpegs_becomes_images_and_labels(tmp_path: Path) -> None:
    train, labels, test, wanted = cifar.load(_npz(tmp_path / "c.npz"))
    assert train.shape == (4, 3, 32, 32)
    assert test.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]
    assert wanted.tolist() == [4, 5]
    for image, color in zip(torch.cat([train, test]), COLORS, strict=True):
        assert (image.float().mean((1, 2)) - torch.tensor(color)).abs().max() < 4


def test_limit_takes_the_first_images_of_training_and_test(tmp_path: Path) -> None:
    train, labels, test, _ = cifar.load(_npz(tmp_path / "c.npz"), limit=1)
    assert (len(train), labels.tolist(), len(test)) == (1, [0], 1)


def test_the_python_batches_are_read_without_running_anything(tmp_path: Path) -> None:
    train, labels, test, _ = cifar.load(_python_batches(tmp_path))
    assert train.shape == (10, 3, 32, 32)
    assert labels.tolist() == [3, 7] * 5
    assert test[0, 0, 0, :4].tolist() == [0, 1, 2, 3]


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.mkdir, (tmp_path / "hacked",))  # type: ignore[return-value]

    (_python_batches(tmp_path) / "data_batch_3").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(NMError, match="has no business in a CIFAR-10 batch"):
        cifar.load(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_every_unreadable_path_is_explained(tmp_path: Path) -> None:
    whole = _npz(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "other.txt").write_text("no images")
    np.savez(tmp_path / "strange.npz", x=np.arange(3))
    _npz(tmp_path / "offsets.npz", offsets=np.arange(3))
    _npz(tmp_path / "split.npz", n_train=np.array(6))
    _npz(tmp_path / "jpeg.npz", jpeg=np.zeros(10**5, np.uint8))
    (tmp_path / "folder").mkdir()
    for name in (
        "gone.npz",
        "cut.npz",
        "empty.npz",
        "other.txt",
        "strange.npz",
        "offsets.npz",
        "split.npz",
        "jpeg.npz",
        "folder",
    ):
        with pytest.raises(NMError, match=re.escape(str(tmp_path / name))):
            cifar.load(tmp_path / name)


def test_the_digits_are_split_in_proportion_and_without_overlap() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1078, 719)
    shares = torch.bincount(data.test_labels) / torch.bincount(torch.cat([data.train_labels, data.test_labels]))
    assert shares.min() > 0.38
    assert shares.max() < 0.42
    whole = torch.cat([data.train, data.test]).flatten(1)
    assert len(whole) == 1797
    assert data.normal(data.train).mean().abs() < 1e-5


def test_a_crop_moves_an_image_and_a_flip_mirrors_it() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    windows = [padded[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    allowed = {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(1))}
    seen = {tuple(augmented(image, 1, flip=True, generator=generator).flatten().tolist()) for _ in range(200)}
    assert seen == allowed
    assert torch.equal(augmented(image, 0, flip=False, generator=generator), image)


def test_the_same_seed_gives_the_same_batches() -> None:
    data = digits(limit=40)
    one, two = (list(batches(data, 16, 2, seed=3)) for _ in range(2))
    assert len(one) == 4
    for (images, labels), (others, wanted) in zip(one, two, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, wanted)


# -- settings and models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("digits", 0.02), ("resnet20", 0.27), ("resnet32", 0.46)])
def test_the_models_have_their_published_sizes(name: str, millions: float) -> None:
    model = build(name, seed=0)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert size == pytest.approx(millions, rel=0.05)


def test_a_seed_fixes_the_initial_weights_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = build("digits", 0), build("digits", 0), build("digits", 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.stem.weight, two.stem.weight)
    assert not torch.equal(one.stem.weight, other.stem.weight)


def test_options_override_the_defaults_of_the_data() -> None:
    assert choose(quick=True, seeds=2).seeds == 2
    assert choose(data="x.npz", device="cpu").model == "resnet20"
    assert choose(data="x.npz", model="resnet32", device="cpu", epochs=1).epochs == 1


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[4] == 1.0
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3


# -- the race ------------------------------------------------------------------------------------------------------------


def test_what_only_the_first_search_of_a_process_costs_is_paid_before_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def search(*args: object, **options: object) -> torch.Tensor:
        told.append("search")
        return quick_search(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setitem(METHODS, "bimask", lambda: BiMask(search=search))
    monkeypatch.setattr(train, "race", lambda *args: told.append("race") or [])  # type: ignore[func-returns-value]
    run(Settings(methods=("bimask",), patterns=(Pattern(2, 4),), seeds=1, epochs=1, limit=16))
    assert told[0] == "search"
    assert told[-1] == "race"


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    steps: list[tuple[int, int, str]] = []
    found = run(
        Settings(patterns=(Pattern(2, 4),), seeds=1, epochs=4, limit=32, batch_size=16), lambda *told: steps.append(told)
    )
    assert [done for done, _, _ in steps] == list(range(1, 9))
    assert {total for _, total, _ in steps} == {8}
    return found


@pytest.mark.ci
def test_every_contestant_ends_exactly_n_of_m_with_a_finite_accuracy(outcome: Outcome) -> None:
    rows = outcome.rows()
    assert [row.entry for row in rows] == [DENSE, *(Entry(method, Pattern(2, 4)) for method in METHODS)]
    for row in rows[1:]:
        assert row.exact == (8, 8)
        assert row.entry.pattern is not None
        assert f"8/8 weights {row.entry.pattern}" in str(outcome)
    for row in rows:
        assert 0.0 <= row.accuracy <= 1.0
        assert 0.0 < row.retained <= 1.0
        assert math.isfinite(row.step)
        assert row.step > 0


@pytest.mark.ci
def test_one_shot_magnitude_is_the_dense_run_until_half_way(outcome: Outcome) -> None:
    (dense,), (pruned,) = outcome.of(DENSE), outcome.of(Entry("magnitude", Pattern(2, 4)))
    assert pruned.begun == 4
    assert pruned.curve[:3] == dense.curve[:3]
    assert len(pruned.seconds) == len(dense.seconds) == 8


@pytest.mark.ci
def test_live_combinations_fall_from_all_to_one(outcome: Outcome) -> None:
    live = [value for _, value in outcome.of(Entry("lbc", Pattern(2, 4)))[0].live]
    assert live[0] == 6
    assert live[2:] == [1] * 3
    assert live == sorted(live, reverse=True)


@pytest.mark.ci
def test_the_searched_order_keeps_at_least_what_the_own_order_keeps_in_most_layers(outcome: Outcome) -> None:
    (found,) = outcome.of(Entry("bimask", Pattern(2, 4)))
    assert len(found.orders) == 8
    assert np.mean([layer.searched - layer.identity for layer in found.orders]) > 0
    assert all(0.5 < layer.chance <= 1 for layer in found.orders)


@pytest.mark.ci
def test_the_page_needs_nothing_else_and_shows_everything(outcome: Outcome) -> None:
    text = page.page(outcome)
    assert not re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", text)
    assert not re.findall(r"<(?:script|link|iframe)", text)
    assert text.count("<svg") == 6
    assert text.count("</svg>") == 6
    for title in ("Accuracy over time", "live combinations over time", "backward mask keeps", "What the compiler changed"):
        assert title in text
    assert "nm.score_weight" in text
    assert "nm.backward_weight" in text
    assert text.count('class="nm-report"') == 4
    assert "$" not in text
    assert text.count("aria-label=") == 6, "each picture says what it shows"
    assert "five ways" in text


def _several_seeds(outcome: Outcome) -> Outcome:
    """As if a second seed had been one point better for everyone, and two for LBC."""
    more = [
        replace(run, seed=1, accuracy=run.accuracy + (0.02 if run.entry.method == "lbc" else 0.01)) for run in outcome.runs
    ]
    return replace(outcome, settings=replace(outcome.settings, seeds=2), runs=(*outcome.runs, *more))


@pytest.mark.ci
def test_the_page_says_first_what_was_found_and_what_may_be_chance(outcome: Outcome) -> None:
    one, two = words.found(outcome), words.found(_several_seeds(outcome))
    dense, *others = outcome.rows()
    best, worst = (100 * (end(row.accuracy for row in others) - dense.accuracy) for end in (max, min))
    assert one.startswith(f"Dense training reached {dense.accuracy:.2%}. At 2:4 the difference was {best:+.2f}, with ")
    assert f"and {worst:+.2f} with " in one
    assert "It was one seed" in one
    assert "Seeds differ by up to ± 1.41 points" in two, "LBC's, two points apart"
    assert one in html.unescape(page.page(outcome))


@pytest.mark.ci
def test_a_page_of_one_seed_speaks_of_no_mean(outcome: Outcome) -> None:
    one, two = page.page(outcome), page.page(_several_seeds(outcome))
    for said in ("mean of the seeds", "standard deviation", "in the worst seed"):
        assert said not in one
        assert said in two


@pytest.mark.ci
def test_the_demo_runs_on_cifar_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = _npz(tmp_path / "c.npz"), tmp_path / "page.html"
    small = ["--methods", "lbc", "--patterns", "1:4", "--seeds", "1", "--epochs", "2", "--device", "cpu"]
    assert cli.main(["demo", "--data", str(data), "--out", str(out), *small]) == 0
    said = capsys.readouterr()
    assert "resnet20 net on CIFAR-10: 4 training and 2 test images, 2 steps of 4 images" in said.out
    assert "yes, 20/20 weights 1:4" in said.out
    assert out.read_text(encoding="utf-8").count("<svg") == 5


def test_a_run_reads_the_data_that_its_settings_name(tmp_path: Path) -> None:
    settings = Settings(data=str(_npz(tmp_path / "c.npz")), model="resnet20")
    data = load(settings)
    assert data.name == "CIFAR-10"
    assert data.flip
