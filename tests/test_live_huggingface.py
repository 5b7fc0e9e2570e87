# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Live Hugging Face models: trainer, generate, adapters on a frozen base, save_pretrained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.solvers.masks import masked

pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'").declare_missing_operators()
transformers = pytest.importorskip("transformers", reason="the zoo is an extra: pip install -e '.[zoo]'", exc_type=ImportError)
pytestmark = pytest.mark.required


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    torch._dynamo.reset()


def llama() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
        pad_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(3, 32, (2, 5))
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": torch.randint(3, 32, (2, 5))}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=32,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 20)}


@pytest.mark.ci
@pytest.mark.parametrize("make", [llama, *(pytest.param(make, marks=pytest.mark.slow) for make in (t5, whisper))])
def test_generate_runs_every_weight_sparse_and_gives_the_tokens_of_the_frozen_model(make: Any) -> None:
    model, inputs = make()
    model = nm.compile(model.eval(), method=nm.BiMask(), then="eager")
    options = {"max_new_tokens": 3, "do_sample": False}
    tokens = model.generate(**inputs, **options)
    rows = [row for row in nm.report(model).rows if row.status == "sparse"]
    assert len(rows) >= 7
    assert all(row.runs for row in rows)
    allowed = ("stem:", "head:", "an embedding", "shared with an embedding", "read by aten.add")
    assert all(row.reason.startswith(allowed) for row in nm.report(model).rows if row.status == "dense")
    assert torch.equal(nm.freeze(model).generate(**inputs, **options), tokens)


@pytest.mark.ci
def test_hidden_states_are_given_once_by_the_live_model_and_by_the_frozen_one() -> None:
    model, inputs = llama()
    model.eval().config.output_hidden_states = True
    count = len(copy.deepcopy(model)(**inputs, use_cache=False).hidden_states)
    model = nm.compile(model, method=nm.Magnitude(), then="eager")
    found = [model(**inputs, use_cache=False) for _ in range(2)] + [nm.freeze(model)(**inputs, use_cache=False)]
    assert [len(each.hidden_states) for each in found] == [count] * 3


@pytest.mark.slow
def test_parts_lowered_in_their_place_generate_the_tokens_of_the_frozen_model_and_a_whole_one_says_how() -> None:
    model, inputs = llama()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = layer.mlp.get_submodule(name).weight
            weight.data = masked(weight.data, pattern="2:4")
    options = {"max_new_tokens": 3, "do_sample": False}
    tokens = model.eval().generate(**inputs, **options)
    any_size, hidden = torch.export.Dim.AUTO, torch.randn(2, 2, model.config.hidden_size)
    for layer in model.model.layers:
        lowered = nm.lower(layer.mlp, (hidden,), backend="dense", dynamic_shapes=({0: any_size, 1: any_size},))
        layer.mlp = lowered
    assert torch.equal(model.generate(**inputs, **options), tokens)
    assert torch.equal(copy.deepcopy(model).generate(**inputs, **options), tokens)
    assert not hasattr(lowered, "generate")
    with pytest.raises(AttributeError, match=r"only forward\(\) was lowered\. .*generate\(\) does, lower parts"):
        lowered.generate(**inputs)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen sequences."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(3, 32, (5,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


@pytest.mark.ci
def test_the_trainer_takes_the_model_itself_and_the_frozen_one_goes_through_save_pretrained(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from nm_compiler.integrations.transformers import SparsityCallback

    model = nm.compile(llama()[0], method=nm.LBC(), then="aot_eager")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[], seed=0,
        save_strategy="no", learning_rate=0.01, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    callback = SparsityCallback()
    transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback]).train()
    assert callback.schedules.tracked[0].scheduler.last_step == 4
    planned = {row.name for row in nm.report(model).rows if row.status == "sparse"}
    assert len(planned) == 7
    assert all(row.runs == 4 and row.nonzero == 0.5 for row in nm.report(model).rows if row.status == "sparse")
    frozen = nm.freeze(model)
    frozen.save_pretrained(tmp_path / "frozen")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "frozen")
    assert set(again.state_dict()) == set(llama()[0].state_dict())
    assert planned <= set(nm.verify(again).satisfied)


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from nm_compiler.integrations.transformers import SparsityCallback

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], seed=0, save_strategy="steps", save_steps=2, learning_rate=0.01, disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[SparsityCallback()])


@pytest.mark.ci
@pytest.mark.parametrize("live", [True, False], ids=["live", "captured"])
def test_the_trainer_resumes_mid_schedule_to_the_bit_with_accumulated_gradients(live: bool, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        model, inputs = llama()
        options = {"then": "eager"} if live else {"kwargs": {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"]}}
        return nm.compile(model, method=nm.LBC(), **options)

    whole, resumed = fresh(), fresh()
    options = {} if live else {"remove_unused_columns": False}
    trainer(whole, tmp_path / "whole", **options).train()
    trainer(resumed, tmp_path / "again", **options).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert len(nm.verify(nm.freeze(whole)).satisfied) >= 7


@pytest.mark.ci
def test_a_model_that_is_saved_while_it_trains_says_what_it_writes_and_verify_knows_it(tmp_path: Path, caplog: Any) -> None:
    model, inputs = llama()
    model = nm.compile(model, method=nm.LBC(), then="eager")
    model(**inputs)
    copied = copy.deepcopy(model)
    for each in (model, model, copied):
        each.save_pretrained(tmp_path / "training")
    said = [record.getMessage() for record in caplog.records if "save_pretrained" in record.getMessage()]
    assert len(said) == 2
    assert "dense weights and the state of LBC" in said[0]
    assert "nm.freeze(model).save_pretrained" in said[0]
    found = nm.verify(tmp_path / "training")
    assert found.training == "LBC"
    assert "Written while it trained with LBC: nm.freeze(model)" in str(found)
    assert {weight.name for weight in found.weights} == {name for name, p in llama()[0].named_parameters() if p.ndim == 2}
    caplog.clear()
    frozen = nm.freeze(model, finish=True)
    frozen.save_pretrained(tmp_path / "frozen")
    assert "save_pretrained" not in frozen.__dict__
    assert not caplog.records
    assert nm.verify(tmp_path / "frozen").training is None


class Adapted(nn.Module):
    """A linear layer that stays, and a low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.ci
def test_adapters_on_a_frozen_base_leave_its_zeros_zero() -> None:
    model, inputs = llama()
    model = nm.compile(model, method=nm.Magnitude(), then="eager")
    model(**inputs)
    planned = {row.name for row in nm.report(model).rows if row.status == "sparse"}
    frozen = nm.freeze(model)
    for layer in frozen.model.layers:
        layer.mlp.up_proj, layer.self_attn.q_proj = Adapted(layer.mlp.up_proj), Adapted(layer.self_attn.q_proj)
    optimizer = torch.optim.AdamW(
        [p for p in frozen.parameters() if (p.requires_grad and p.ndim == 1) or p.shape[0] == 2], lr=0.1
    )
    for _ in range(2):
        frozen(**inputs).logits.square().mean().backward()
        optimizer.step()
    satisfied = set(nm.verify(frozen).satisfied)
    assert {name.replace("up_proj.", "up_proj.base.").replace("q_proj.", "q_proj.base.") for name in planned} <= satisfied
