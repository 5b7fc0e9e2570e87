"""What README.md, docs/ and examples/ show is what happens."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import nm_compiler as nm
from nm_compiler.methods.base import Method
from nm_compiler.pattern import Pattern

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_cnn", ROOT / "examples" / "train_cnn.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_example_trains_a_model_whose_middle_weight_is_2_4(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    first = python_blocks(ROOT / "README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 18
    exec(compile(first, "README.md", "exec"), scope)
    model = scope["model"]
    assert type(model) is nn.Sequential
    assert nm.verify(model, "2:4").satisfied == {"2.weight": (1,)}
    assert not [name for name in model.state_dict() if name.endswith(("_scores", "_live", "nm_recipe"))]
    assert "1 of 3 weights are 2:4." in capsys.readouterr().out


@pytest.mark.ci(here=["README", "lowering", "methods", "new-method", "permutation", "CHANGELOG"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_other_python_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(python_blocks(page)[page.name == "README.md" :]):
        exec(compile(block, f"{page.name}, block {number}", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_make_target_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:nm_compiler|passes|runtime|tests|docs|examples|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=[`\n ]*[`\n])", text)) <= targets


def test_the_map_of_the_package_names_every_file_and_folder_once() -> None:
    here = README[README.index("## Where things are") : README.index("## Papers")]
    package = ROOT / "nm_compiler"
    files = sorted(path.name for path in package.glob("*.py") if not path.name.startswith("__"))
    rows = "".join(row for row in here.splitlines() if row.startswith("| ") and "?" in row.split("|")[1])
    assert sorted(re.findall(r"`(\w+\.py)`", rows)) == files
    folders = {path.parent.name for path in package.glob("*/__init__.py") if not path.parent.is_symlink()}
    assert folders <= set(re.findall(r"^\| `nm_compiler/(\w+)/`", here, re.M))


MAPPED = (
    "axes", "axes/rules", "capture", "demo", "fragments", "integrations", "live", "methods", "sites", "solvers", "state", "streaming",
)  # fmt: skip
RUNTIMES = ("", "/backends", "/cusparselt", "/native", "/onnx_files", "/tensorrt")


@pytest.mark.parametrize(
    "folder", [*(f"nm_compiler/{name}" for name in MAPPED), "passes", *(f"runtime{name}" for name in RUNTIMES)]
)
def test_a_folder_says_at_its_top_what_each_of_its_files_is_for(folder: str) -> None:
    """Kernels of a file go without saying: ``masks_kernels`` and ``masks_triton`` are those of ``masks``."""
    names = {path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
    files = sorted(name for name in names if not re.fullmatch(rf"({'|'.join(names)})_(kernels|triton)", name))
    assert sorted(re.findall(r"^(\w+) {2,}\S", (ROOT / folder / "__init__.py").read_text(), re.M)) == files


def test_every_page_is_named_in_the_table_of_pages() -> None:
    here = README[README.index("## Documentation") : README.index("## What it keeps")]
    linked = set(re.findall(r"\]\(([^)#]+)\)", here))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked
    assert {"examples/README.md", "benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= linked


def test_the_accuracies_on_digits_are_those_that_were_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "digits.json").read_text())
    accuracy = {(row["method"], row["pattern"]): 100 * row["accuracy"] for row in found["rows"]}
    dense = accuracy["dense", None]
    for pattern, first in (("2:4", f"| digits, {found['steps']} steps (`make demo`), accuracy at 2:4 | {dense:.2f} %"),
                           ("1:4", "| at 1:4; one image is 0.14 points |")):  # fmt: skip
        gaps = [f"{accuracy[method, pattern] - dense:+.1f}" for method in ("magnitude", "srste", "lbc", "bimask")]
        assert f"{first} | {' | '.join(gaps)} |" in README


def test_the_accuracies_on_cifar10_are_those_that_were_measured() -> None:
    accuracy: dict[str, list[float]] = {}
    for path in sorted((ROOT / "benchmarks" / "results" / "cifar10_long").glob("*.json")):
        found = json.loads(path.read_text())
        assert found["recipe"]["epochs"] == 10
        accuracy.setdefault(found["cell"]["method"], []).append(100 * found["accuracy"])
    assert {len(seeds) for seeds in accuracy.values()} == {2}
    mean = {method: statistics.fmean(seeds) for method, seeds in accuracy.items()}
    gaps = [f"{mean[method] - mean['dense']:+.1f}" for method in ("srste", "lbc", "bimask")]
    assert f"| ResNet-20 on CIFAR-10, 10 epochs, accuracy at 2:4 | {mean['dense']:.2f} % | | {' | '.join(gaps)} |" in README


def test_the_gpt_and_the_steps_are_those_that_were_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    bits: dict[tuple[str, str], list[float]] = {}
    for path in sorted((results / "characters_long").glob("*.json")):
        found = json.loads(path.read_text())
        bits.setdefault((found["cell"]["method"], found["cell"]["pattern"]), []).append(found["bits"])
    mean = {cell: statistics.fmean(values) for cell, values in bits.items()}
    dense = mean["dense", ""]
    for pattern, first in (("2:4", f"lower is better) | {dense:.3f} |"), ("1:16", "| at 1:16 | |")):
        gaps = [f"{mean[method, pattern] - dense:+.3f}" for method in ("srste", "lbc", "bimask")]
        assert f"{first} | {' | '.join(gaps)} |" in README
    for file, net, row in (("step_time", "resnet20", "ResNet-20, batch 128"), ("step_time", "transformer", "transformer, 4 x 512, 4,096 tokens"),
                           ("step_time_large", "resnet50", "ResNet-50, batch 32, 112 pixels"), ("step_time_large", "vit_s", "ViT-S, 4 blocks, batch 32")):  # fmt: skip
        cells = json.loads((results / f"{file}.json").read_text())[net]
        ours = [f"{cells[name]['ratio_with_due']:.2f}x" for name in ("LBC(position)", "BiMask")]
        theirs = f"{cells['LBC as published']['ratio_with_due']:.2f}x / {cells['Bi-Mask as published']['ratio_with_due']:.1f}x"
        assert f"| {row} | {' | '.join(ours)} | {theirs} |" in README


def test_the_networks_on_a_cpu_are_those_that_were_measured() -> None:
    one, two = (
        {net["net"].replace("1 tokens", "1 token"): net for net in json.loads((ROOT / "benchmarks" / "results" / f"cpu-nets-{name}.json").read_text())["nets"]}
        for name in ("1-thread", "2-threads")
    )  # fmt: skip
    shown = {"ViT-B/16": "ViT-B/16", "BERT-base, 128 tokens": "BERT-base, 128 tokens", "ResNet-50": "ResNet-50, batch 1",
             "ResNet-50, batch 8": "ResNet-50, batch 8", "Llama-shaped block, one token": "Llama-shaped block, 1 token",
             "MobileNetV2, whose products are small": "MobileNetV2, batch 1"}  # fmt: skip
    for row, net in shown.items():
        assert f"| {row} | {one[net]['over inductor']:.2f}x | {two[net]['over inductor']:.2f}x |" in README
    page = (ROOT / "docs" / "cpu.md").read_text()
    for net in one:
        cells = [
            f"{found['ms']['inductor']:.1f} | {found['ms']['packed']:.1f} | {found['over inductor']:.2f}x | {found['compiled over inductor']:.2f}x"
            for found in (one[net], two[net])
        ]
        assert f"| {net} | {' | '.join(cells)} |" in page


def test_the_table_of_methods_names_every_method_and_no_other() -> None:
    shown = set(re.findall(r"^\| `nm\.(\w+)\(\)`", README, re.M))
    exported = {
        name for name in nm.__all__ if isinstance(getattr(nm, name), type) and issubclass(getattr(nm, name), Method)
    } - {"Method"}
    assert shown == exported


@pytest.mark.ci
@pytest.mark.required
@pytest.mark.parametrize("method", ["LBC", "BiMask"])
def test_the_example_script_goes_on_exactly_where_it_was_stopped(method: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    example = load_example()
    arguments = ["--method", method, "--steps", "12", "--pattern", "1:4"]
    straight = example.main(arguments)
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt")]
    example.main([*arguments, *checkpoint, "--stop-at", "5"])
    resumed = example.main([*arguments, *checkpoint])
    assert [name for name, _ in straight.named_parameters()] == [name for name, _ in resumed.named_parameters()]
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert set(nm.verify(resumed, Pattern(1, 4)).satisfied) == {"3.weight", "6.weight", "9.weight"}
