# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""peft's LoRA on a frozen sparse base, which keeps its zeros, and what it does to a model that still trains sparse."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nm_compiler as nm

pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'").declare_missing_operators()
transformers = pytest.importorskip("transformers", reason="pip install -e '.[hf]'", exc_type=ImportError)
peft = pytest.importorskip("peft", reason="pip install -e '.[hf]'", exc_type=ImportError)
pytestmark = pytest.mark.required

ADAPTED = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    torch._dynamo.reset()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokens() -> dict[str, Tensor]:
    rows = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, set[str]]:
    model = nm.compile(llama(), method=nm.Magnitude(), then="eager")
    model(**tokens())
    planned = {row.name for row in nm.report(model).rows if row.status == "sparse"}
    assert len(planned) == 7
    return nm.freeze(model), planned


@pytest.fixture
def base(made: tuple[nn.Module, set[str]]) -> nn.Module:
    """A frozen llama whose seven projections are 2:4."""
    return copy.deepcopy(made[0])


@pytest.fixture
def planned(made: tuple[nn.Module, set[str]]) -> set[str]:
    """The names of these projections."""
    return made[1]


def lora(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=ADAPTED))


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def inside(name: str) -> str:
    """Where peft puts a weight of the base."""
    for layer in ADAPTED:
        name = name.replace(f"{layer}.weight", f"{layer}.base_layer.weight")
    return f"base_model.model.{name}"


@pytest.mark.ci
def test_adapters_train_on_a_frozen_sparse_base_whose_zeros_stay_zero_and_reload(
    base: nn.Module, planned: set[str], tmp_path: Path
) -> None:
    before = copy.deepcopy(base)
    tuned = lora(base)
    losses = train(tuned, 5)
    assert losses[-1] < losses[0]
    assert all(p.any() for name, p in tuned.named_parameters() if "lora_B" in name)
    for name in planned:  # to the bit, zeros and all
        assert torch.equal(tuned.get_parameter(inside(name)), before.get_parameter(name))
    assert {inside(name) for name in planned} <= set(nm.verify(tuned, "2:4").satisfied)

    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(before, tmp_path)
    assert torch.equal(again.eval()(**tokens()).logits, tuned.eval()(**tokens()).logits)
    assert {inside(name) for name in planned} <= set(nm.verify(again, "2:4").satisfied)


@pytest.mark.slow
def test_merged_adapters_fill_the_zeros_which_verify_says_and_magnitude_prunes_them_again(
    base: nn.Module, planned: set[str]
) -> None:
    tuned = lora(base)
    train(tuned, 2)
    merged = tuned.merge_and_unload()
    filled = {name for name in planned if name.split(".")[-2] in ADAPTED}
    verification = nm.verify(merged, "2:4")
    assert planned - set(verification.satisfied) == filled
    line = next(line for line in str(verification).splitlines() if "q_proj" in line)
    assert line.endswith("100.0% non-zero  2:4: no")
    again = nm.compile(merged, method=nm.Magnitude(), then="eager")  # N:M again, the smallest of each group gone
    again(**tokens())
    assert planned <= set(nm.verify(nm.freeze(again), "2:4").satisfied)


@pytest.mark.ci
@pytest.mark.parametrize("live", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["live", "captured"])
def test_peft_over_a_model_that_still_trains_sparse_is_an_error_until_it_is_unloaded(live: bool) -> None:
    given = {name: value for name, value in tokens().items() if name != "labels"}
    how = {"then": "eager"} if live else {"kwargs": given}
    model = nm.compile(llama(), method=nm.SRSTE(), **how)
    expected = model(**given).logits
    tuned = lora(model)
    with pytest.raises(nm.NMError, match=r"q_proj was replaced after nm\.compile: .* after nm\.freeze"):
        tuned(**given)
    model = tuned.unload()
    torch.testing.assert_close(model(**given).logits, expected)
    base = nm.freeze(model)
    assert len(nm.verify(lora(base), "2:4").satisfied) >= 7


@pytest.mark.slow
def test_a_model_with_adapters_trains_sparse_under_them_when_they_are_left_dense() -> None:
    tuned = nm.compile(lora(llama()), method=nm.LBC(), exclude="*lora_*", then="eager")
    train(tuned, 3)
    rows = {row.name: row for row in nm.report(tuned).rows}
    assert sum(row.status == "sparse" for row in rows.values()) == 7
    assert all(row.reason.startswith("excluded") for name, row in rows.items() if "lora_" in name)
    assert all(tuned.get_parameter(name).any() for name in rows if "lora_B" in name)
    nm.freeze(tuned, finish=True)


@pytest.mark.slow
def test_a_frozen_base_with_adapters_is_lowered_and_asked_for_no_cache(base: nn.Module, planned: set[str]) -> None:
    tuned, given = lora(base).eval(), {"input_ids": tokens()["input_ids"]}
    lowered = nm.lower(tuned, kwargs=given, backend="dense")
    torch.testing.assert_close(lowered(**given).logits, tuned(**given).logits)
    assert {inside(name) for name in planned} <= set(lowered.sites)
