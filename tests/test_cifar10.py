# mypy: disable-error-code="arg-type,assignment,attr-defined,func-returns-value,index,no-untyped-call,operator,union-attr"
"""The CIFAR-10 reproduction: its networks, its images, its runs and its table."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import cifar10_table
import pytest
import torch
from reproduction import together as together_module
from reproduction import training as training_module
from reproduction.grid import LATE, METHODS, PATTERNS, Cell, Recipe, grid, random_search
from reproduction.images import Images, prepare
from reproduction.models import MODELS, CifarResNet, build
from reproduction.pool import Place, Speed, epochs_in, run_all
from reproduction.stepping import Eager, difference, restore, warmed
from reproduction.together import run_together
from reproduction.training import Training
from torch import nn

import nm_compiler as nm
from nm_compiler.solvers.backward_order import kept_importance

CPU = torch.device("cpu")
SHORT = Recipe(batch=8, interval=3, lr=0.05)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a thousand weights in the place of ResNet-20."""
    monkeypatch.setitem(MODELS, "resnet20", lambda: CifarResNet(1, 4))


def images(count: int = 40, channels_last: bool = False) -> Images:
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (count, 40, 40, 3), dtype=torch.uint8, generator=generator)
    test = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = [torch.randint(0, 10, (size,), generator=generator) for size in (count, 12)]
    return Images(train, labels[0], test, labels[1], torch.full((3,), 127.0), torch.full((3,), 60.0), channels_last)


def saved(folder: Path) -> Path:
    """Forty images to train with and twelve to test, as `prepare` leaves them."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(n) % 10) for n in (40, 12)
    ]
    torch.save(tuple(tensor for part in parts for tensor in part), folder / "images.pt")
    return folder / "images.pt"


def trainer(folder: Path, method: str = "lbc", **change: Any) -> Training:
    pattern = "" if method == "dense" else "2:4"
    made = Training(Cell("resnet20", method, pattern, 0), Recipe(**{**vars_of(SHORT), **change}), CPU, folder, graphs=False)
    made.attach(images(channels_last=made.recipe.channels_last))
    return made


def vars_of(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet20", 0.27e6), ("resnet32", 0.46e6), ("resnet32x2", 1.85e6), ("vgg19", 20.0e6), ("mobilenetv2", 2.19e6),
        ("mobilenetv2_fullconv", 42.8e6),
    ],
)  # fmt: skip
def test_networks_have_the_sizes_of_the_papers(name: str, weights: float) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
        assert sum(p.numel() for p in model.parameters() if p.ndim == 4) == pytest.approx(weights, rel=0.02)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_every_method_starts_at_the_same_weights_and_another_seed_at_others() -> None:
    first, again, other = (build("resnet20", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_the_grid_has_the_dense_network_once_a_seed_and_is_complete_seed_by_seed() -> None:
    cells = grid(["resnet20"], ["dense", "lbc", "bimask"], PATTERNS[:2], range(2))
    assert len(cells) == len({cell.name for cell in cells}) == 2 * (1 + 2 * 2)
    assert [cell.seed for cell in cells] == [0] * 5 + [1] * 5
    assert [cell.name for cell in cells if cell.method == "dense"] == ["resnet20-dense-seed0", "resnet20-dense-seed1"]


def test_every_method_of_the_grid_has_a_title() -> None:
    assert set(cifar10_table.TITLES) == set(METHODS)


def test_the_ablations_order_is_the_best_of_ten_random_ones() -> None:
    importance, order = torch.rand(16, 30), torch.arange(16)
    found = random_search(importance, order, 2, 4, moves=0, seed=3)
    assert found.sort().values.tolist() == order.tolist()
    assert torch.equal(found, random_search(importance, order.flip(0), 2, 4, moves=9, seed=3))
    generator = torch.Generator().manual_seed(3)
    kept = [float(kept_importance(importance, torch.randperm(16, generator=generator), 2, 4)) for _ in range(10)]
    assert float(kept_importance(importance, found, 2, 4)) == max(kept)


def test_an_epoch_shows_every_image_once_moved_by_up_to_four_pixels_and_half_of_them_mirrored() -> None:
    count = 64
    base = images(count)
    ramp = torch.arange(40, dtype=torch.uint8)
    train = torch.stack((torch.arange(count, dtype=torch.uint8).view(-1, 1, 1).expand(count, 40, 40),
                         ramp.view(1, -1, 1).expand(count, 40, 40), ramp.expand(count, 40, 40)), -1)  # fmt: skip
    plain = Images(train.contiguous(), torch.arange(count), base.test, base.test_labels, torch.zeros(3), torch.ones(3), False)
    batches = list(plain.epoch(16, seed=0, epoch=0))
    seen, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.sort().values.tolist() == list(range(count))
    assert torch.equal(seen[:, 0, 0, 0].long(), labels)
    assert set(seen[:, 1, 0, 0].tolist()) == set(range(9)), "not every shift down occurs"
    rising = seen[:, 2, 0, 1] > seen[:, 2, 0, 0]
    assert 16 < int(rising.sum()) < 48
    left = torch.where(rising, seen[:, 2, 0, 0], seen[:, 2, 0, 31])
    assert set(left.tolist()) == set(range(9))
    assert torch.equal(seen[:, 2].diff(dim=-1).abs(), torch.ones(count, 32, 31))


def test_epochs_of_a_seed_differ_and_are_the_same_again() -> None:
    some = images()
    one, again, other = (next(some.epoch(8, 0, epoch))[0] for epoch in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert next(images(channels_last=True).epoch(8, 0, 3))[0].is_contiguous(memory_format=torch.channels_last)


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 2, 3]), torch.ones(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([4]))  # fmt: skip
    calls: list[Any] = []
    monkeypatch.setattr("nm_compiler.demo.cifar.load", lambda *given: calls.append(given) or parts)
    source = tmp_path / "cifar10_jpeg.npz"
    source.write_bytes(b"x")
    for _ in range(2):
        found = Images.load(prepare(source, tmp_path / "cache", None), CPU, False)
    assert len(calls) == 1
    assert found.train.shape == (3, 40, 40, 3)
    assert int(found.train.sum()) == 0
    assert found.test.shape == (1, 32, 32, 3)


@pytest.mark.ci(here=["lbc", "[dense]", "[bimask]"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_ends_exactly_n_m_and_writes_its_json(method: str, tmp_path: Path, tiny: None) -> None:
    run = trainer(tmp_path, method)
    found = run.train(epochs=2)
    written = json.loads(run.file.read_text())
    assert written["accuracy"] == found.accuracy == written["curve"][-1][1]
    assert written["steps"] == 10
    assert len(written["losses"]) == 2
    assert written["exact"] == ([0, 0] if method == "dense" else [6, 6])
    assert (written["one_shot"] is not None) == (method in LATE)
    assert (written["backward_kept"] is not None) == ("bimask" in method)
    assert (len(written["live"]) > 0) == method.startswith("lbc")
    assert not run.checkpoint.exists()


@pytest.mark.ci(here=["[lbc]"])
@pytest.mark.parametrize("method", ["dense", pytest.param("magnitude", marks=pytest.mark.slow), "lbc", "bimask"])
def test_a_run_that_was_stopped_ends_at_the_same_weights(
    method: str, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "a", method)
    whole.folder.mkdir()
    whole.train(epochs=4)
    monkeypatch.setattr(training_module, "SAVE_EVERY_S", 0.0)
    stopped = trainer(tmp_path / "b", method)
    stopped.folder.mkdir()
    save, saves = stopped._save, itertools.count(1)

    def save_and_stop() -> None:
        save()
        if next(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(epochs=4)
    again = trainer(tmp_path / "b", method)
    found = again.train(epochs=4)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert found.losses == whole.found.losses
    assert found.curve == whole.found.curve


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "SAVE_EVERY_S", 0.0)
    run = trainer(tmp_path)
    run.total, run.done = 10, 5
    run._start()
    run._save()
    with pytest.raises(nm.NMError, match="of another length or recipe"):
        trainer(tmp_path, lr=0.1).train(epochs=2)


@pytest.mark.ci
def test_measuring_the_speed_teaches_nothing(tmp_path: Path, tiny: None) -> None:
    for method in ("dense", "lbc", "bimask"):
        run = trainer(tmp_path, method)
        before = {name: value.clone() for name, value in run.running.state_dict().items()}
        assert run.speed(0.05) > 0
        assert all(torch.equal(value, before[name]) for name, value in run.running.state_dict().items())


def test_bf16_and_channels_last_train(tmp_path: Path, tiny: None) -> None:
    found = trainer(tmp_path, "bimask", precision="bf16", channels_last=True).train(epochs=1)
    assert found.exact == (6, 6)
    assert math.isfinite(found.losses[0])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny: None) -> None:
    run = trainer(tmp_path, "dense")
    run.model.head.weight.data.fill_(float("inf"))
    with pytest.raises(nm.NMError, match="resnet20-dense-seed0: the loss is nan at step 5"):
        run.train(epochs=1)


def test_warming_up_leaves_the_model_as_it_was_and_says_how_a_step_runs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step, how = warmed(Eager(model, CPU, "fp32", 0.1), torch.randn(8, 3, 32, 32), torch.arange(8), graphs=False)
    assert how == "eager"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loss = step(torch.randn(8, 3, 32, 32), torch.arange(8))
    assert model[0].weight.grad is not None
    assert loss.requires_grad is False
    restore(model, before)


def test_a_difference_counts_the_loss_and_the_gradients_apart() -> None:
    wanted = [torch.tensor(1.0), torch.tensor([100.0, 0.0])]
    assert difference(wanted, wanted) == 0
    assert difference([torch.tensor(1.5), wanted[1]], wanted) == pytest.approx(0.5)
    assert difference([wanted[0], torch.tensor([100.0, 1.0])], wanted) == pytest.approx(0.01)


def test_the_epochs_are_the_most_with_which_the_last_run_ends_in_time() -> None:
    fast, slow = Speed(steps_per_s=20.0, look_s=0.0), Speed(steps_per_s=10.0, look_s=0.0)
    cells = grid(["resnet20"], ["dense", "lbc"], ["2:4"], range(2))
    known = {("dense", ""): fast, ("lbc", "2:4"): slow}
    both = epochs_in(100.0, known, cells, per_epoch=100, parallel=4, start_s=0.0)
    assert both == 10.0, "the slow ones take 10 s an epoch"
    assert epochs_in(100.0, known, cells, per_epoch=100, parallel=2, start_s=0.0) == 5.0  # two of them after each other
    assert epochs_in(100.0, known, cells, per_epoch=100, parallel=2, start_s=10.0) == 4.5
    assert epochs_in(1.0, known, cells, per_epoch=100, parallel=4, start_s=0.0) == 1.0


@pytest.mark.slow
def test_runs_in_processes_of_their_own_end_in_the_time_given_and_one_that_fails_is_named(tmp_path: Path) -> None:
    parts = [torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.arange(64) % 10] * 2
    torch.save(tuple(parts), tmp_path / "images.pt")
    cells = [Cell("resnet20", method, pattern, 0) for method, pattern in (("bimask", "2:4"), ("lbc", "3:5"), ("lbc", "1:4"))]
    said: list[str] = []
    begin = time.monotonic()
    failed = run_all(
        cells, SHORT, Place("cpu", tmp_path, False, 1), lambda: tmp_path / "images.pt", said.append, parallel=2,
        deadline=begin + 120,
    )  # fmt: skip
    assert time.monotonic() - begin < 120
    assert [cell.pattern for cell in failed] == ["3:5"]
    assert any("resnet20-lbc-3of5-seed0 FAILED" in line and "3:5" in line for line in said)
    runs = cifar10_table.load(tmp_path)
    assert set(runs) == {("resnet20", "2:4", "bimask"), ("resnet20", "1:4", "lbc")}
    lengths = {run["recipe"]["epochs"] for group in runs.values() for run in group}
    assert len(lengths) == 1
    assert lengths.pop() >= 1


@pytest.mark.ci
def test_runs_together_in_one_process_are_the_runs_alone(tmp_path: Path, tiny: None) -> None:
    cells = [Cell("resnet20", method, pattern, 0) for method, pattern in (("dense", ""), ("lbc", "2:4"), ("bimask", "2:4"))]
    images, recipe = saved(tmp_path), Recipe(**{**vars_of(SHORT), "epochs": 2})
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    assert run_together(cells, recipe, Place("cpu", together, False, 1), lambda: images, str, deadline=None) == []
    for cell in cells:
        run = Training(cell, recipe, CPU, alone, graphs=False)
        run.attach(Images.load(images, CPU, False))
        run.train(recipe.epochs)
        one, other = (json.loads((folder / run.file.name).read_text()) for folder in (alone, together))
        assert all(one[key] == other[key] for key in ("losses", "curve", "accuracy", "steps", "live"))


@pytest.mark.ci
def test_runs_together_all_have_the_epochs_that_end_in_time_and_one_that_fails_is_named(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together_module, "MEASURE_S", 0.05)
    monkeypatch.setattr(together_module, "END_S", 0.0)
    cells = [Cell("resnet20", method, pattern, 0) for method, pattern in (("bimask", "2:4"), ("lbc", "3:5"), ("lbc", "1:4"))]
    images, said = saved(tmp_path), list[str]()
    deadline = time.monotonic() + 4
    failed = run_together(cells, SHORT, Place("cpu", tmp_path, False, 1), lambda: images, said.append, deadline=deadline)
    assert [cell.pattern for cell in failed] == ["3:5"]
    assert any("resnet20-lbc-3of5-seed0 FAILED" in line and "3:5" in line for line in said)
    lengths = {json.loads(file.read_text())["recipe"]["epochs"] for file in tmp_path.glob("*.json")}
    assert len(lengths) == 1
    assert lengths.pop() >= 1


def test_the_table_shows_means_spreads_and_what_is_missing_to_dense(tmp_path: Path) -> None:
    cells = grid(["resnet20"], ["dense", "lbc", "bimask"], ["1:16", "2:4"], range(2))
    for cell in cells:
        accuracy = {"dense": 0.90, "lbc": 0.89, "bimask": 0.88}[cell.method] + 0.01 * cell.seed
        body = {
            "cell": cell.as_json(), "recipe": vars_of(SHORT), "train": 10, "accuracy": accuracy, "exact": [3, 3],
            "curve": [[1.0, 0.5], [2.0, accuracy]], "device": "cpu", "one_shot": None,
        }  # fmt: skip
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(body))
    runs = cifar10_table.load(tmp_path)
    lines = cifar10_table.table(runs, "resnet20").splitlines()
    assert lines[2:] == [
        "| | 2:4 | 1:16 |",
        "|---|---|---|",
        "| dense | 90.50 ± 0.71 | 90.50 ± 0.71 |",
        "| LBC | 89.50 ± 0.71 (-1.00) | 89.50 ± 0.71 (-1.00) |",
        "| Bi-Mask | 88.50 ± 0.71 (-2.00) | 88.50 ± 0.71 (-2.00) |",
    ]
    pytest.importorskip("matplotlib")
    cifar10_table.plot(runs, "resnet20", tmp_path / "curves.svg")
    assert "</svg>" in (tmp_path / "curves.svg").read_text()
