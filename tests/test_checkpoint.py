# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Checkpoints are written whole or not at all, and loaded whole or not at all."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import ConvNet, example
from precompiled import precompiled

import nm_compiler as nm


def parts(method: Any, total: int = 8) -> dict[str, Any]:
    torch.manual_seed(0)
    sparse, _ = precompiled(ConvNet(), method)
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse), lr=0.05, momentum=0.9)
    scheduler = nm.SparsityScheduler(sparse, total_steps=total, optimizer=optimizer)
    return {"model": sparse, "optimizer": optimizer, "scheduler": scheduler}


def step(made: dict[str, Any], times: int) -> None:
    for at in range(times):
        made["model"](example(ConvNet(), batch=4, seed=at)).square().mean().backward()
        made["optimizer"].step()
        made["optimizer"].zero_grad()
        made["scheduler"].step()


def snapshot(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made["model"].state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


class Odd:
    """Has a ``state_dict``, which holds more than tensors."""

    def state_dict(self) -> dict[str, Any]:
        return {"best": [1.0, {"accuracy": np.float64(0.5)}]}


@pytest.mark.parametrize(
    ("extra", "said"),
    [({"best": np.float64(0.5)}, r"best= holds a numpy.float64"), ({"args": Namespace(lr=0.1)}, r"args= holds a argparse.Namespace"),
     ({"odd": Odd()}, r"odd= holds a numpy.float64"), ({"hook": lambda: None}, r"hook= holds a builtins.function")],
)  # fmt: skip
def test_what_could_not_be_loaded_again_is_not_saved_over_what_can(extra: dict[str, Any], said: str, tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", torch.nn.Linear(2, 2)
    nm.save_checkpoint(path, model=model, epoch=1, best=0.5, args={"lr": 0.1}, seen={1, 2}, scale=torch.tensor(2.0))
    with pytest.raises(nm.NMError, match=said):
        nm.save_checkpoint(path, model=model, epoch=2, **extra)
    assert nm.load_checkpoint(path, model=model) == {
        "epoch": 1, "best": 0.5, "args": {"lr": 0.1}, "seen": {1, 2}, "scale": torch.tensor(2.0),
    }  # fmt: skip
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask(interval=2, moves=20)], ids=["LBC", "BiMask"])
def test_a_checkpoint_brings_back_all_parts_and_what_was_saved_beside_them(method: Any, tmp_path: Path) -> None:
    made = parts(method)
    step(made, 3)
    nm.save_checkpoint(tmp_path / "run.pt", **made, epoch=3, best={"accuracy": 0.5})
    again = parts(method)
    rest = nm.load_checkpoint(tmp_path / "run.pt", **again)
    assert rest == {"epoch": 3, "best": {"accuracy": 0.5}}
    assert same(snapshot(made), snapshot(again))
    assert again["scheduler"].last_step == 3
    step(made, 5)
    step(again, 5)
    assert same(snapshot(made), snapshot(again))
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


class Full:
    """A disk that fills up: a file object that takes so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = parts(nm.LBC()), tmp_path / "run.pt"
    nm.save_checkpoint(file, **made)
    old = file.read_bytes()
    step(made, 1)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: Full(opened(self, *args), 3_000))
    with pytest.raises(nm.NMError, match=r"run\.pt could not be written .*the checkpoint that was there is intact"):
        nm.save_checkpoint(file, **made)
    monkeypatch.undo()
    assert file.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]
    nm.load_checkpoint(file, **parts(nm.LBC()))


def test_an_interrupted_save_is_an_interruption_and_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.pt"
    nm.save_checkpoint(file, epoch=1)

    def interrupted(*_: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")  # as torch's writer says when it is left

    with monkeypatch.context() as patch:
        patch.setattr(nm.checkpoint.torch, "save", interrupted)
        patch.setattr(nm.checkpoint, "_check_readable", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            nm.save_checkpoint(file, epoch=2)
    assert nm.load_checkpoint(file) == {"epoch": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]


def test_a_process_that_dies_while_it_writes_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    made, file = parts(nm.LBC()), tmp_path / "run.pt"
    nm.save_checkpoint(file, **made)
    old = file.read_bytes()
    program = f"""
import os, pathlib, torch, nm_compiler as nm
opened = pathlib.Path.open
class Dying:
    def __init__(self, file): self.file, self.left = file, 2000
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, data):
        self.left -= len(data)
        self.file.write(data); self.file.flush()
        if self.left < 0: os._exit(9)
        return len(data)
pathlib.Path.open = lambda self, *args: Dying(opened(self, *args))
nm.save_checkpoint({str(file)!r}, values=torch.zeros(100_000), more=torch.ones(100_000))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert ended.returncode == 9
    assert file.read_bytes() == old


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lambda: parts(nm.SRSTE()), "saved for SRSTE"),
        (lambda: parts(nm.LBC(scores="combination")), "saved for LBC"),
        (lambda: parts(nm.LBC(), total=9), "saved with total_steps=9"),
        (lambda: {**parts(nm.LBC()), "model": torch.nn.Linear(2, 2)}, "does not fit|state_dict"),
        (lambda: {"model": parts(nm.LBC())["model"]}, "has no optimizer, scheduler"),
    ],
    ids=["method", "layout", "length", "architecture", "parts"],
)
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(saved: Any, message: str, tmp_path: Path) -> None:
    nm.save_checkpoint(tmp_path / "other.pt", **saved())
    made = parts(nm.LBC())
    step(made, 2)
    before, momenta = snapshot(made), len(made["optimizer"].state)
    with pytest.raises(nm.NMError, match=message):
        nm.load_checkpoint(tmp_path / "other.pt", **made)
    assert same(before, snapshot(made))
    assert made["scheduler"].last_step == 2
    assert len(made["optimizer"].state) == momenta
    step(made, 2)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(nm.NMError, match="is not there"):
        nm.load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(nm.NMError, match="cannot be read as a checkpoint"):
        nm.load_checkpoint(tmp_path / "half.pt")
    with pytest.raises(nm.NMError, match="could not be written .*nothing was left behind"):
        nm.save_checkpoint(tmp_path / "no folder" / "run.pt", epoch=1)
