"""The command line: exit statuses, and mistakes told in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nm_compiler import cli

SPARSE = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]])


def test_verify_exits_with_0_if_a_weight_satisfies_the_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": SPARSE, "b": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    assert cli.main(["verify", str(tmp_path / "model.safetensors"), "--pattern", "2:4"]) == 0
    assert "1 of 2 weights are 2:4." in capsys.readouterr().out


def test_verify_exits_with_1_if_no_weight_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": SPARSE}, tmp_path / "model.pt")
    assert cli.main(["verify", str(tmp_path / "model.pt"), "--pattern", "1:4"]) == 1
    assert "0 of 1 weights are 1:4." in capsys.readouterr().out


@pytest.mark.parametrize("order", [("a*=1:4", "2:4"), ("2:4", "a*=1:4")], ids=str)
def test_verify_takes_patterns_by_glob_and_one_for_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], order: tuple[str, str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.eye(4), "b": SPARSE}, path)
    words = ["verify", str(path), "--pattern", order[0], "--pattern", order[1], "--weights", "a", "b"]
    assert cli.main(words) == 0
    assert "2 of 2 weights are a* 1:4, * 2:4." in capsys.readouterr().out
    save_file({"a": SPARSE, "b": SPARSE.clone()}, path)
    assert cli.main(words) == 1
    capsys.readouterr()
    assert cli.main([*words, "--pattern", "c=2:4"]) == 2
    assert "--pattern c=2:4 matches no weight" in capsys.readouterr().err
    assert cli.main([*words, "--pattern", "1:4"]) == 2
    assert "--pattern 1:4: another --pattern gives all weights 2:4" in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.parametrize("module", ["nm_compiler", "nm_compiler.cli"])
def test_as_a_module_it_exits_with_the_same_status(tmp_path: Path, module: str) -> None:
    save_file({"a": SPARSE}, tmp_path / "model.safetensors")
    words = [sys.executable, "-m", module, "verify", str(tmp_path / "model.safetensors"), "--pattern", "1:4"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "0 of 1 weights are 1:4." in done.stdout


@pytest.mark.parametrize("case", ["missing", "truncated", "pattern"])
def test_verify_exits_with_2_and_one_line_on_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    path = tmp_path / "model.pt"
    if case != "missing":
        torch.save({"a": SPARSE}, path)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    assert cli.main(["verify", str(path), "--pattern", "4:2" if case == "pattern" else "2:4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nm-compiler: ")
    assert error.count("\n") == 1
    assert ("did you mean '2:4'?" if case == "pattern" else str(path)) in error


@pytest.mark.ci
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.npz"], "nowhere.npz: no such file or folder"),
        (["--model", "resnet20"], "--data PATH"),
        (["--model", "vgg"], "no model called 'vgg'"),
        (["--methods", "lbcc"], "no method called 'lbcc': choose from magnitude, srste, lbc, bimask"),
        (["--patterns", "4:2"], "did you mean '2:4'?"),
        (["--methods", "magnitude", "--patterns", "3:7"], "3:7"),
        (["--seeds", "0"], "--seeds 0: needs a whole number of at least 1"),
        (["--device", "warp"], "--device warp cannot be used here"),
        (["--out", "no/such/folder/page.html"], "does not exist"),
    ],
)
def test_the_demo_explains_a_mistake_before_it_trains(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_EXTRAS", ("no_such_package",))
    assert cli.main(["demo"]) == 2
    assert "no_such_package: pip install 'nm_compiler[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("no/such/folder/page.html", "--html no/such/folder/page.html: the folder"),
        (".", "--html . is a folder: name a file in it"),
    ],
)
def test_a_page_that_has_no_place_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], file: str, said: str
) -> None:
    assert cli.main(["report", "no_such_module_here:load", "--inputs", "4x16", "--html", file]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("values", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.int64)], ids=["a bias", "whole numbers"])
def test_verify_says_that_a_file_without_weights_has_nothing_to_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: torch.Tensor
) -> None:
    torch.save({"a": values}, tmp_path / "model.pt")
    assert cli.main(["verify", str(tmp_path / "model.pt")]) == 1
    assert capsys.readouterr().out == "Nothing to check: no floating-point tensor of two or more axes is here.\n"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_empty_file_is_called_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    (tmp_path / f"model.{suffix}").touch()
    assert cli.main(["verify", str(tmp_path / f"model.{suffix}")]) == 2
    assert f"model.{suffix} is empty: save it again, as model.state_dict()" in capsys.readouterr().err


def test_verify_lines_up_shapes_of_any_length_and_names_two_axes_as_axes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": torch.zeros(4, 4), "long": torch.zeros(1024, 4, 1, 1, 1, 1, 1)}, tmp_path / "model.safetensors")
    cli.main(["verify", str(tmp_path / "model.safetensors")])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "a     4x4                 0.0% non-zero  2:4: yes, axes 0 and 1",
        "long  1024x4x1x1x1x1x1    0.0% non-zero  2:4: yes, axes 0 and 1",
    ]


def test_a_command_that_is_not_there_is_answered_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prunee"])
    error = capsys.readouterr().err
    assert "argument COMMAND: invalid choice: 'prunee' (choose from" in error
    assert error.startswith("usage: nm-compiler [-h] COMMAND ...")


@pytest.mark.parametrize(
    ("command", "first"), [("verify", "FILE"), ("prune", "CHECKPOINT_DIR OUT"), ("report", "MODULE:FACTORY")]
)
def test_the_usage_of_a_command_is_an_order_in_which_it_can_be_called(
    command: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that takes several words takes what stands behind it, so what has no option in front of it comes first."""
    with pytest.raises(SystemExit):
        cli.main([command])
    assert capsys.readouterr().err.startswith(f"usage: nm-compiler {command} {first} ")


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "verify" in capsys.readouterr().out


FACTORY = """
import torch, nm_compiler as nm
from torch import nn

def load():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return nm.freeze(nm.compile(model, (torch.randn(2, 16),), method=nm.Magnitude()))

def broken():
    raise ValueError("no weights there")

number = 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factory_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_report_lowers_a_model_and_prints_a_line_a_weight(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", f"{factory}:load", "--inputs", "4x16", "--dtype", "bfloat16", "--html", "page.html"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"2\.weight +linear +64x64 +2:4 +(sparse|dense) .*(CPU packed 2:4|measured [0-9.]+x of dense (at 4 tokens|in the whole graph))",
        said,
    ), said
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "<table>" in Path("page.html").read_text(encoding="utf-8")
    assert cli.main(["report", f"{factory}:load", "--inputs", "4x16", "--pattern", "2.*=2:4", "--pattern", "1:8"]) == 0
    assert re.search(r"2\.weight +linear +64x64 +2:4 ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        ("load", "4x16", "is not MODULE:FACTORY"),
        ("{}:lod", "4x16", "FACTORY is a function in it, or a model"),
        ("no_such_module_here:load", "4x16", "MODULE is looked for in the working directory"),
        ("{}:broken", "4x16", "failed: ValueError: no weights there"),
        ("{}:number", "4x16", "gives int, not a torch.nn.Module: name a function"),
        ("{}:load", "4x16b", "is not a shape"),
        ("{}:load", "4x16:floot", "'floot' is no dtype"),
        ("{}:load", "4x15", "could not be captured"),
    ],
)
def test_report_explains_a_mistake(
    factory: str, capsys: pytest.CaptureFixture[str], model: str, inputs: str, said: str
) -> None:
    assert cli.main(["report", model.format(factory), "--inputs", inputs]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
