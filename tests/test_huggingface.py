# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Hugging Face models that branch on their data in training: sparse there too, and trained as the masked eager model is."""

import itertools
from typing import Any

import pytest
import torch
from models import dense
from torch import Tensor, nn
from torch.func import functional_call

import nm_compiler as nm
from nm_compiler.fragments.dynamo import Fragments

pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'").declare_missing_operators()
transformers = pytest.importorskip("transformers", reason="the zoo is an extra: pip install -e '.[zoo]'", exc_type=ImportError)
pytestmark = pytest.mark.required


def detr() -> tuple[nn.Module, dict[str, Tensor]]:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=5, num_labels=3, dropout=0.0, num_channels=3,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, vocab_size=12, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
        activation_dropout=0.0, final_dropout=0.0, layerdrop=0.01, mask_time_prob=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 400)}


def loss_of(output: Any) -> Tensor:
    return sum((value.square().sum() for key, value in output.items() if key in ("logits", "pred_boxes")), torch.zeros(()))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("method", "make"),
    [
        (nm.LBC(), wav2vec2),
        (nm.BiMask(), wav2vec2),
        *(pytest.param(m, detr, marks=pytest.mark.slow) for m in (nm.BiMask(), nm.LBC())),
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_a_model_that_branches_on_data_in_training_trains_every_planned_weight(make: Any, method: Any) -> None:
    model, inputs = make()
    model.requires_grad_(True)  # DETR freezes its backbone
    model, inputs = model.double(), {name: value.double() for name, value in inputs.items()}
    sparse = nm.compile(model, kwargs=inputs, method=method)
    assert isinstance(sparse.routes[True], Fragments)
    nm.SparsityScheduler(sparse, total_steps=4).step()
    sparse.train()
    masks = {site.name: sparse.masked(site.name)[0] != 0 for site in sparse.plan.sites}
    torch.manual_seed(0)
    output = sparse(**inputs)
    loss_of(output).backward()
    without = [name for name in masks if model.get_parameter(name).grad is None]
    assert not without
    found = {name: model.get_parameter(name).grad.clone() for name in masks}
    leaves = {name: (model.get_parameter(name).detach() * mask).requires_grad_() for name, mask in masks.items()}
    torch.manual_seed(0)
    expected = functional_call(model, leaves, kwargs=inputs)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-12, atol=1e-12)
    if isinstance(method, nm.LBC):
        loss_of(expected).backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(found[name], leaf.grad * masks[name], rtol=1e-12, atol=1e-12, msg=name)
    frozen = nm.freeze(sparse, finish=True)
    assert set(masks) <= {name for name, axes in nm.verify(frozen).satisfied.items() if 1 in axes}


@pytest.mark.ci
def test_a_cache_that_is_asked_for_comes_back() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 32, (2, 5))
    sparse = nm.compile(model, kwargs={"input_ids": tokens, "use_cache": True}, method=nm.LBC()).eval()
    model.eval()
    output = sparse(input_ids=tokens, use_cache=True)
    torch.testing.assert_close(output.logits, dense(model, input_ids=tokens).logits)
    assert output.past_key_values.get_seq_length() == 5


def llama() -> tuple[nn.Module, list[str]]:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    return transformers.LlamaForCausalLM(config), ["*.mlp", "*.self_attn.?_proj"]


def t5() -> tuple[nn.Module, list[str]]:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), ["*.DenseReluDense", "*.SelfAttention.?", "*.EncDecAttention.?"]


def gpt2() -> tuple[nn.Module, list[str]]:
    """Its weights are [in, out]."""
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config), ["*.mlp", "*.c_attn", "*.attn.c_proj"]


def mixtral() -> tuple[nn.Module, list[str]]:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config), ["*_proj"]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "beams": {"num_beams": 2}, "static cache": {"cache_implementation": "static"}, "sampled": {"do_sample": True},
}  # fmt: skip


@pytest.mark.parametrize("make", [llama, *(pytest.param(each, marks=pytest.mark.ci) for each in (t5, gpt2, mixtral))])
def test_a_model_whose_parts_are_lowered_generates_what_it_generated(make: Any) -> None:
    torch.manual_seed(0)
    model, parts = make()
    live = nm.compile(model, method=nm.Magnitude(), then="eager")
    tokens = torch.randint(2, 50, (2, 5))
    live(input_ids=tokens, labels=tokens)
    model = nm.freeze(live).eval()
    run = lambda model: model.generate(input_ids=tokens, max_new_tokens=3)  # noqa: E731
    fast = nm.lower_parts(model, parts, run, backend="cpu", force=["*"])
    assert type(fast) is type(model)
    padded = torch.ones(3, 9, dtype=torch.int64)
    padded[0, :4] = 0
    inputs = ({"input_ids": tokens}, {"input_ids": torch.randint(2, 50, (3, 9)), "attention_mask": padded})
    for given, (way, options) in itertools.product(inputs, WAYS.items()):
        both = []
        for each in (model, fast):
            torch.manual_seed(1)
            both.append(each.generate(**given, max_new_tokens=6, **{"do_sample": False, "pad_token_id": 0, **options}))
        assert torch.equal(*both), way
    packed = {row.name for row in nm.report(fast).rows if row.kernel}
    assert packed == {name for name in nm.verify(model).satisfied if "experts" not in name}
