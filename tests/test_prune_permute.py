# mypy: disable-error-code="arg-type,assignment,attr-defined,index,no-any-return,no-untyped-call,operator,union-attr"
"""prune --permute: the pruned checkpoint is that of the permuted model, with classes searched one at a time from the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import layers, read_all, write_folder
from safetensors.torch import save_file

import nm_compiler as nm
from nm_compiler.errors import NMError
from nm_compiler.passes.permute import permute_state
from nm_compiler.solvers.importance import ria
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.streaming import ordering, prune
from nm_compiler.streaming.meta_model import meta_model

WORDS = {"input_ids": torch.arange(32).reshape(2, 16) % 48}


@pytest.fixture(scope="module")
def llama(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=48, intermediate_size=64
    )
    model = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("llama") / "dense"
    model.save_pretrained(path, max_shard_size="12KB")
    return model, path


@pytest.fixture(scope="module")
def axes(llama: Any) -> Any:
    _, dense = llama
    return ordering.find_axes(meta_model(dense, json.loads((dense / "config.json").read_text())))[1]


@pytest.fixture
def captured_once(axes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing takes a second, and the axes of the model are the same in every test."""
    monkeypatch.setattr(prune, "find_axes", lambda model: (model, axes))


@pytest.mark.ci
@pytest.mark.parametrize("rule", ["magnitude", "ria"])
def test_the_checkpoint_is_that_of_the_permuted_and_pruned_model(
    llama: Any, tmp_path: Path, rule: str, captured_once: None, axes: Any
) -> None:
    model, dense = llama
    before = read_all(dense)
    norms = {name: torch.rand(value.shape[1]) for name, value in before.items() if "proj" in name}
    save_file(norms, tmp_path / "norms.safetensors")
    options = {} if rule == "magnitude" else {"importance": rule, "statistics": tmp_path / "norms.safetensors"}
    found = nm.prune_checkpoint(dense, tmp_path / "out", permute=True, budget_s=0.3, **options)
    assert found.orders
    assert "permuted model.layers.0." in str(found)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    permute_state(twin, axes=axes, orders=found.orders)
    torch.testing.assert_close(twin(**WORDS).logits, model(**WORDS).logits)
    after, kept, plain = read_all(tmp_path / "out"), 0.0, 0.0
    for name, value in after.items():
        moved = twin.get_parameter(name)
        if name not in found.pruned:
            assert torch.equal(value, moved), name
            continue
        assert torch.equal(value, moved * (value != 0)), name
        assert int((value.unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2
        if rule == "magnitude":
            assert torch.equal(value, moved * magnitude_mask(moved, 2, 4, 1)), name
        squares = norms[name].double().square()
        worth = before[name].abs() if rule == "magnitude" else ria(before[name], squares, out_axis=0, row_axes=[1])
        plain += float((worth * magnitude_mask(worth, 2, 4, 1)).sum())
        kept += float(worth[torch.isin(before[name], value[value != 0])].sum())  # random weights are all different
    assert kept > plain
    assert type(model).from_pretrained(tmp_path / "out")


@pytest.mark.ci
def test_a_run_that_goes_on_keeps_its_orders(llama: Any, tmp_path: Path, captured_once: None) -> None:
    _, dense = llama
    out = tmp_path / "out"

    def stop(shard: str, tensor: str, size: int) -> None:
        if shard.startswith("model-00002"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nm.prune_checkpoint(dense, out, permute=True, budget_s=0.2, progress=stop)
    assert (out / ordering.ORDERS).exists()
    orders = ordering.ORDERS
    saved = (out / orders).read_bytes()
    found = nm.prune_checkpoint(dense, out, permute=True, budget_s=0.2)
    assert found.went_on == 1
    assert (out / orders).read_bytes() == saved
    with pytest.raises(NMError, match="another run of prune: permute was"):
        nm.prune_checkpoint(dense, out)


def test_a_class_that_would_need_more_memory_than_two_layers_keeps_its_order(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captured_once: None
) -> None:
    monkeypatch.setattr(ordering, "_FLOOR", 0)
    found = nm.prune_checkpoint(llama[1], tmp_path / "out", permute=True, budget_s=0.3)
    assert not found.orders
    assert "channels: its search would take" in str(found)
    assert nm.verify(tmp_path / "out").satisfied


def test_a_tensor_that_the_checkpoint_lacks_pins_what_runs_through_it(llama: Any, tmp_path: Path, captured_once: None) -> None:
    _, dense = llama
    tensors = {name: value for name, value in read_all(dense).items() if name != "model.layers.0.mlp.gate_proj.weight"}
    config = json.loads((dense / "config.json").read_text())
    found = nm.prune_checkpoint(
        write_folder(tmp_path / "part", [tensors], config), tmp_path / "out", permute=True, budget_s=0.3
    )
    assert "it runs through model.layers.0.mlp.gate_proj.weight, which the checkpoint does not hold" in str(found)
    assert not any("layers.0.mlp" in name for name in found.orders)
    assert any("layers.0.self_attn" in name for name in found.orders)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"permute": True}, "there is none: config.json is missing or empty; leave --permute out"),
        ({"budget_s": 3.0}, "it goes with permute=True"),
    ],
)
def test_without_a_graph_there_is_no_permutation(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    dense = write_folder(tmp_path / "dense", layers(2))
    with pytest.raises(NMError, match=said):
        nm.prune_checkpoint(dense, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_captured_is_told(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NMError("control flow on data")

    monkeypatch.setattr(ordering, "capture_mode", refuse)
    with pytest.raises(NMError, match="the LlamaForCausalLM of config.json cannot be captured.*control flow on data"):
        nm.prune_checkpoint(llama[1], tmp_path / "out", permute=True)
    assert not (tmp_path / "out").exists()
