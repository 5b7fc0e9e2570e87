# mypy: disable-error-code="arg-type,attr-defined,no-any-return,no-untyped-call,operator,union-attr"
"""The scripts in examples/ run, end in N:M weights, and say truly how many lines of them are ours."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nm_compiler as nm

EXAMPLES = Path(__file__).parents[1] / "examples"
FAKE = ["--fake", "--image-size", "32", "--epochs", "2", "--batch-size", "32", "--workers", "0", "--device", "cpu"]

shim = pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'")
pytestmark = pytest.mark.required


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    torch._dynamo.reset()
    shim.declare_missing_operators()


def main_of(name: str, needs: str) -> Any:
    pytest.importorskip(needs, reason=f"this example is about {needs}, which is not installed", exc_type=ImportError)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("name", ["timm_train", "torchvision_train", "hf_trainer"])
def test_three_lines_are_ours_and_without_them_none_speaks_of_us(name: str) -> None:
    body = (EXAMPLES / f"{name}.py").read_text().split('"""', 2)[2].splitlines()
    ours = [line for line in body if line.endswith("  # nm")]
    assert len(ours) == 3
    assert [line for line in body if "import" in line and "nm_compiler" in line]
    rest = [line for line in body if line not in ours and "import" not in line]
    assert not [line for line in rest if ("nm." in line or "Sparsity" in line) and "nm.verify" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("amp", [[], ["--amp"]], ids=["float32", "amp"])
def test_timms_parts_train_a_vision_transformer_whose_average_is_2_4(
    amp: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = main_of("timm_train", "timm")
    import timm

    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, img_size=32, depth=2, embed_dim=32))
    model = main([*FAKE, *amp, "--model", "test_vit", "--then", "eager", "--out", str(tmp_path / "vit.pt")])
    assert type(model).__name__ == "VisionTransformer"
    wanted = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert wanted <= set(nm.verify(model, "2:4").satisfied)
    assert wanted <= set(nm.verify(tmp_path / "vit.pt", "2:4").satisfied)


def small(num_classes: int) -> nn.Module:
    """What torchvision's builders return, but small."""
    layers = [layer for wide in (3, 16) for layer in (nn.Conv2d(wide, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


@pytest.mark.ci
@pytest.mark.parametrize("model", ["small", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_torchvisions_recipe_trains_a_network_whose_average_is_2_4(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main = main_of("torchvision_train", "torchvision")
    import torchvision

    if model == "small":
        monkeypatch.setattr(torchvision.models, "get_model", lambda name, num_classes: small(num_classes))
    found = main([*FAKE, "--amp", "--model", model, "--then", "eager"])
    wanted = {"3.weight"} if model == "small" else {"layer1.0.conv1.weight", "layer4.1.conv2.weight"}
    assert wanted <= set(nm.verify(found, "2:4").satisfied)
    assert all(int(each.num_batches_tracked) for each in found.modules() if isinstance(each, nn.BatchNorm2d))


@pytest.mark.slow
def test_hugging_faces_trainer_trains_a_llama_that_loads_again(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    main = main_of("hf_trainer", "transformers")
    small = ["--steps", "3", "--layers", "1", "--hidden", "16", "--batch-size", "4", "--cpu", "--then", "eager"]
    model = main([*small, "--out", str(tmp_path)])
    again = type(model).from_pretrained(tmp_path)
    assert len(nm.verify(again, "2:4").satisfied) == 7
