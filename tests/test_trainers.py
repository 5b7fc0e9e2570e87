# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,dict-item,misc,name-defined,no-any-return,no-untyped-call,operator,return-value,type-arg,union-attr"
"""Lightning's and Hugging Face's trainers drive the masks; telemetry reaches TensorBoard and CSV files."""

import csv
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import MLP
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.integrations.schedules import Schedules
from nm_compiler.integrations.writers import csv_file, tensorboard

pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'").declare_missing_operators()
pytestmark = pytest.mark.required

METHODS = [nm.LBC(), nm.BiMask(interval=2, moves=20)]
each_method = pytest.mark.parametrize("method", METHODS, ids=["LBC", "BiMask"])


def compiled(method: Any) -> nm.SparseModule:
    torch.manual_seed(0)
    return nm.compile(MLP(), (torch.randn(4, 8),), method=method)


class Rows(torch.utils.data.Dataset):
    """64 rows whose labels a linear rule gives."""

    def __init__(self) -> None:
        self.x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        self.y = self.x[:, :4].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "labels": self.y[index]}


# -- Lightning --------------------------------------------------------------------------------------------------------------


def lit(method: Any) -> Any:
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = compiled(method)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(nm.parameter_groups(self.net), lr=0.1, momentum=0.9)

    return Lit()


def fit(
    module: Any, callback: Any, folder: Path, *, epochs: int, resume: Path | None = None, more: Any = (), **options: Any
) -> Any:
    import pytorch_lightning as lightning

    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback, *more], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=8), ckpt_path=resume, weights_only=False)
    return trainer


@pytest.mark.filterwarnings("ignore")
@each_method
def test_lightning_trains_to_exactly_n_m_and_counts_optimizer_steps(method: Any, tmp_path: Path) -> None:
    module = lit(method)
    from nm_compiler.integrations.lightning import SparsityCallback

    rows: list[Any] = []
    callback = SparsityCallback(every=4, write=rows.append)
    fit(module, callback, tmp_path, epochs=2, accumulate_grad_batches=2)
    assert callback.schedules.tracked[0].scheduler.last_step == 8
    assert [row["step"] for row in rows] == [4, 8]
    assert set(nm.verify(nm.freeze(module.net)).satisfied) >= {"fc2.weight"}


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")
@each_method
def test_lightning_resumes_to_the_bit(method: Any, tmp_path: Path) -> None:
    whole, first, second = lit(method), lit(method), lit(method)
    from nm_compiler.integrations.lightning import SparsityCallback

    fit(whole, SparsityCallback(total_steps=16), tmp_path, epochs=2)
    fit(first, SparsityCallback(total_steps=16), tmp_path, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, SparsityCallback(total_steps=16), tmp_path, epochs=2, resume=tmp_path / "half.ckpt")
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore")
def test_lightning_steps_each_compiled_model_of_a_gan_with_its_own_optimizer(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    from nm_compiler.integrations.lightning import SparsityCallback

    class Gan(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = compiled(nm.LBC()), compiled(nm.SRSTE(decoupled=True))

        def training_step(self, batch: Any, index: int) -> None:
            generator, critic = self.optimizers()
            for _ in range(2):
                critic.zero_grad()
                self.manual_backward(self.critic(batch["x"]).square().mean())
                critic.step()
            generator.zero_grad()
            self.manual_backward(self.generator(batch["x"]).square().mean())
            generator.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.generator, self.critic)]

    module = Gan()
    callback = SparsityCallback({"generator": 8, "critic": 16})
    trainer = fit(module, callback, tmp_path, epochs=1)
    assert [each.scheduler.last_step for each in callback.schedules.tracked] == [8, 16]
    assert set(nm.verify(nm.freeze(module.generator)).satisfied) >= {"fc2.weight"}
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    with pytest.raises(
        nm.NMError, match=r"total_steps= names \['critic'\], the compiled modules are \['critic', 'generator'\]"
    ):
        fit(Gan(), SparsityCallback({"critic": 16}), tmp_path, epochs=1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_fits_after_its_learning_rate_finder_and_beside_an_average(tmp_path: Path) -> None:
    module = lit(nm.LBC())
    import pytorch_lightning as lightning

    from nm_compiler.integrations.lightning import SparsityCallback

    callback = SparsityCallback()
    module.average = torch.optim.swa_utils.AveragedModel(module.net)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    rows = torch.utils.data.DataLoader(Rows(), batch_size=8)
    module.lr = 0.1
    lightning.tuner.Tuner(trainer).lr_find(module, rows, num_training=3, update_attr=False)
    trainer.fit(module, rows)
    assert callback.schedules.tracked[0].scheduler.last_step == 8
    assert set(nm.verify(nm.freeze(module.net)).satisfied) >= {"fc2.weight"}


@pytest.mark.filterwarnings("ignore")
def test_lightnings_averages_copy_masks_and_do_not_average_them(tmp_path: Path) -> None:
    module = lit(nm.LBC())
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="an older Lightning")
    from nm_compiler.integrations.lightning import SparsityCallback

    with pytest.raises(
        nm.NMError, match=r"EMAWeightAveraging averages buffers too, .*say EMAWeightAveraging\(use_buffers=False\)"
    ):
        fit(module, SparsityCallback(), tmp_path, epochs=1, more=[averaging.EMAWeightAveraging()])
    module = lit(nm.LBC())
    average = averaging.EMAWeightAveraging(decay=0.9, use_buffers=False)
    fit(module, SparsityCallback(), tmp_path, epochs=1, more=[average])
    assert set(nm.verify(nm.freeze(module.net)).satisfied) >= {"fc2.weight"}


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_training_that_accumulates_more_later_says_how_long_it_is(tmp_path: Path) -> None:
    module = lit(nm.SRSTE())
    import pytorch_lightning as lightning

    from nm_compiler.integrations.lightning import SparsityCallback

    later = lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    with pytest.raises(nm.NMError, match=r"as in the first: say SparsityCallback\(total_steps=\.\.\.\)"):
        fit(module, SparsityCallback(), tmp_path, epochs=2, more=[later])
    callback = SparsityCallback(total_steps=10)
    fit(lit(nm.SRSTE()), callback, tmp_path, epochs=2, more=[later])
    assert callback.schedules.tracked[0].scheduler.last_step == 10


# -- Hugging Face -----------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """As Hugging Face's trainer wants it: keyword inputs, a dict with the loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face(method: Any, folder: Path, steps: int, resume: str | None = None, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from nm_compiler.integrations.transformers import SparsityCallback

    net = compiled(method)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], save_strategy="steps", save_steps=4, remove_unused_columns=False, learning_rate=0.01, disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False, seed=0, **options,
    )  # fmt: skip
    callback = SparsityCallback()
    trainer = transformers.Trainer(Classifier(net), arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return net, callback


@pytest.mark.filterwarnings("ignore")
@each_method
def test_hugging_faces_trainer_trains_to_exactly_n_m_and_resumes(method: Any, tmp_path: Path) -> None:
    whole, callback = hugging_face(method, tmp_path / "whole", 8)
    assert callback.schedules.tracked[0].scheduler.last_step == 8
    resumed, _ = hugging_face(method, tmp_path / "again", 8, resume=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[name], msg=name)
    assert set(nm.verify(nm.freeze(whole)).satisfied) >= {"fc2.weight"}


@dataclass(frozen=True)
class Reads(nm.Magnitude):
    """Notes in which steps the weights have gradients."""

    seen: list[bool] = field(default_factory=list, compare=False, repr=False)

    def advance(self, weights: Any, clock: Any) -> None:
        self.seen.append(all(weight.param.grad is not None for weight in weights))
        super().advance(weights, clock)


@pytest.mark.filterwarnings("ignore")
def test_a_method_reads_gradients_in_hugging_faces_trainer(tmp_path: Path) -> None:
    method = Reads()
    hugging_face(method, tmp_path, 4)
    assert method.seen == [True] * 4


def test_a_trainer_that_knows_no_event_after_the_optimizer_steps_the_masks_at_the_end_of_a_step() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from nm_compiler.integrations.transformers import SparsityCallback

    callback, state = SparsityCallback(), SimpleNamespace(max_steps=4, global_step=0)
    callback.on_train_begin(None, state, None, model=compiled(nm.LBC()))
    for _ in range(3):
        callback.on_step_end(None, state, None)
    assert callback.schedules.tracked[0].scheduler.last_step == 3


# -- both -------------------------------------------------------------------------------------------------------------------


def test_several_compiled_parts_are_driven_together_and_their_rows_are_told_apart() -> None:
    model = nn.ModuleDict({"one": compiled(nm.LBC()), "two": compiled(nm.BiMask(interval=2, moves=20))})
    rows: list[Any] = []
    schedules = Schedules(model, 4, every=2, write=rows.append)
    for _ in range(3):
        schedules.step()
    assert [(row["step"], row["module"], list(row["weights"])) for row in rows] == [
        (2, "one", ["one.fc2.weight"]),
        (2, "two", ["two.fc2.weight"]),
    ]
    twin = Schedules(nn.ModuleDict({"one": compiled(nm.LBC()), "two": compiled(nm.BiMask(interval=2, moves=20))}), 4)
    twin.load_state_dict(schedules.state_dict())
    assert [each.scheduler.last_step for each in twin.tracked] == [3, 3]
    with pytest.raises(nm.NMError, match=r"saved for the compiled modules \['one', 'two'\], this model has \[''\]"):
        Schedules(compiled(nm.LBC()), 4).load_state_dict(schedules.state_dict())


def test_a_trainer_without_a_compiled_model_is_told_so_before_it_trains() -> None:
    with pytest.raises(nm.NMError, match=r"MLP holds nothing that nm\.compile returned"):
        Schedules(MLP(), 4)
    with pytest.raises(nm.NMError, match="telemetry needs both"):
        Schedules(compiled(nm.LBC()), 4, every=2)


def test_a_csv_file_has_a_line_for_every_weight_and_goes_on_where_it_was(tmp_path: Path) -> None:
    sparse, file = compiled(nm.BiMask()), tmp_path / "masks.csv"
    row = nm.Telemetry(sparse, every=1).step()
    csv_file(file)(row)
    pickle.loads(pickle.dumps(csv_file(file)))({**row, "step": 2})  # as it comes to a process that a trainer starts
    lines = list(csv.DictReader(file.open()))
    assert [(line["step"], line["name"]) for line in lines] == [(s, n) for s in "12" for n in ("total", "fc2.weight")]
    assert float(lines[0]["retained"]) == row["total"]["retained"]
    assert lines[0]["live"] == ""
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(nm.NMError, match=r"other\.csv is not a file of telemetry"):
        csv_file(tmp_path / "other.csv")


def test_a_csv_file_has_columns_for_the_numbers_that_a_method_adds(tmp_path: Path) -> None:
    file, row = tmp_path / "masks.csv", nm.Telemetry(compiled(nm.SRSTE()), every=1).step()
    more = {**row, "weights": {name: {**values, "largest": 2.0} for name, values in row["weights"].items()}}
    csv_file(file)(more)
    csv_file(file)({**row, "step": 2})
    assert [line["largest"] for line in csv.DictReader(file.open())] == ["", "2.0", "", ""]
    csv_file(tmp_path / "plain.csv")(row)
    with pytest.raises(
        nm.NMError, match=r"plain\.csv has no column 'largest', which this row has: give csv_file another path"
    ):
        csv_file(tmp_path / "plain.csv")(more)


class Recorder:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert tag not in self.scalars, f"{tag} of two modules"
        self.scalars[tag] = (value, step)


def test_the_totals_of_several_compiled_parts_are_told_apart(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": compiled(nm.SRSTE()), "two": compiled(nm.SRSTE())})
    recorder, file = Recorder(), tmp_path / "masks.csv"
    Schedules(model, 4, every=1, write=tensorboard(recorder)).step()
    assert {"sparsity/one.total/retained", "sparsity/two.total/retained"} < set(recorder.scalars)
    Schedules(model, 4, every=1, write=csv_file(file)).step()
    assert [line["name"] for line in csv.DictReader(file.open())] == [
        "one.total", "one.fc2.weight", "two.total", "two.fc2.weight",
    ]  # fmt: skip


def test_tensorboard_gets_a_scalar_for_every_number() -> None:
    recorder, row = Recorder(), nm.Telemetry(compiled(nm.LBC()), every=1).step()
    tensorboard(recorder)(row)
    assert recorder.scalars["sparsity/fc2.weight/live"] == (6.0, 1)
    assert recorder.scalars["sparsity/total/retained"] == (1.0, 1)
