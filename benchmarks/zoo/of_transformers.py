"""Families of Hugging Face transformers, each from a small random configuration of its own class.

One rule makes a configuration small: every size that it has and `TINY` names. What the rule leaves large, or makes
contradictory, `SPECIAL` settles. Which head a family gets, and so which inputs, is said by the list that it is in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Built, Entry
from zoo.shim import declare_missing_operators

WORDS, LENGTH = 96, 8
TINY: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "dim", "n_embd", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_ff", "hidden_dim"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": WORDS, "image_size": 32, "patch_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip

CAUSAL = """
    afmoe apertus arcee biogpt bitnet bloom codegen cohere cohere2 ctrl deepseek_v2 deepseek_v3 diffllama ernie4_5
    ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense internlm3
    jamba jetmoe lfm2 llama llama4_text mamba mamba2 minimax ministral mistral mixtral modernbert-decoder mpt nanochat
    nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe
    qwen3_next recurrent_gemma rwkv seed_oss smollm3 stablelm starcoder2 xglm xlnet
"""
MASKED = """
    albert bert big_bird camembert convbert deberta deberta-v2 distilbert electra ernie esm eurobert fnet ibert
    longformer megatron-bert mobilebert modernbert mpnet nystromformer rembert roberta roformer squeezebert xlm-roberta yoso
"""
SEQ2SEQ = "bart bigbird_pegasus blenderbot led m2m_100 marian mbart mt5 pegasus prophetnet t5 umt5"
SEQ2SEQ_MASKED = "longt5 switch_transformers"  # make no mask of their own while they are captured
IMAGES = """
    beit bit convnext convnextv2 data2vec-vision dinov2 dinov2_with_registers efficientnet focalnet hiera ijepa
    mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet resnet segformer swiftformer swin
    swinv2 vit vit_msn
"""
WAVES = "data2vec-audio hubert sew unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm"
PAIRS = "clip metaclip_2 siglip"
DETECTORS = "detr table-transformer yolos"

_CONVS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]}
_PYRAMID = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1]}
_WINDOWS = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
_TOWERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SPEECH = {"conv_dim": [32, 32, 32], "conv_stride": [5, 4, 4], "conv_kernel": [10, 4, 4], "num_conv_pos_embeddings": 16,
           "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
           "qk_head_dim": 24, "v_head_dim": 16, "head_dim": 8,
           "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}  # fmt: skip
_DETECTS = {"num_queries": 5, "use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
SPECIAL: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"num_mel_bins": 16, "max_length": 64},
    "bit": _CONVS | {"num_groups": 4},
    "clip": {"projection_dim": 64},
    "codegen": {"rotary_dim": 8},
    "convnext": _PYRAMID | {"patch_size": 4},
    "convnextv2": _PYRAMID | {"patch_size": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "detr": _DETECTS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64},
    "focalnet": {"embed_dim": 32, "depths": [1, 1, 2, 1], "patch_size": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "hiera": {"image_size": [64, 64], "embed_dim": 32, "depths": [1, 1, 1, 1]},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "led": {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4},
    "levit": {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8], "patch_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 4},
    "metaclip_2": {"projection_dim": 64},
    "mobilevit": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 32, 32, 64], "image_size": 64,
                  "patch_size": 2},
    "mobilevitv2": {"image_size": 64, "patch_size": 2, "width_multiplier": 0.25},
    "poolformer": _PYRAMID,
    "pvt": _PYRAMID | {"image_size": 64, "patch_size": 4, "num_attention_heads": [1, 2, 4, 4]},
    "pvt_v2": _PYRAMID | {"image_size": 64, "num_attention_heads": [1, 2, 4, 4]},
    "qwen3_next": {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                   "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8},
    "regnet": _CONVS | {"hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 2, 1], "groups_width": 16},
    "resnet": _CONVS | {"hidden_sizes": [32, 64], "layer_type": "bottleneck"},
    "segformer": _PYRAMID | {"num_attention_heads": [1, 2, 4, 8]},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "table-transformer": _DETECTS,
    "yolos": {"image_size": [32, 32], "num_detection_tokens": 5},
    **dict.fromkeys(WAVES.split(), _SPEECH),
}  # fmt: skip


def entries() -> list[Entry]:
    """One entry a family, named after its ``model_type``."""
    recipes: list[tuple[str, str, Callable[[Any], dict[str, Tensor]]]] = [
        (CAUSAL, "AutoModelForCausalLM", _words),
        (MASKED, "AutoModelForMaskedLM", _words),
        (SEQ2SEQ, "AutoModelForSeq2SeqLM", lambda config: _words(config) | {"decoder_input_ids": _ids()}),
        (SEQ2SEQ_MASKED, "AutoModelForSeq2SeqLM", lambda config: _words(config) | {"decoder_input_ids": _ids(), **_masks()}),
        (IMAGES, "AutoModelForImageClassification", _images),
        (WAVES, "AutoModelForCTC", lambda config: {"input_values": torch.randn(2, 1600)}),
    ]
    listed = [_entry(name, head, inputs) for names, head, inputs in recipes for name in names.split()]
    pairs = [_entry(name, "AutoModel", _pair, "logits_per_image") for name in PAIRS.split()]
    return [
        *listed,
        *pairs,
        _entry("audio-spectrogram-transformer", "AutoModelForAudioClassification", _spectra),
        _entry("speech_to_text", "AutoModelForSpeechSeq2Seq", _speech),
        _entry("whisper", "AutoModelForSpeechSeq2Seq", _speech),
        _entry("vilt", "ViltForQuestionAnswering", lambda config: _words(config) | _images(config)),
        _entry("deit", "DeiTForImageClassification", _images),  # for these two the automatic head is a distillation pair
        _entry("levit", "LevitForImageClassification", _images),
        *(_entry(name, "AutoModelForObjectDetection", _images) for name in DETECTORS.split()),
    ]


def _entry(name: str, head: str, inputs: Callable[[Any], dict[str, Tensor]], outputs: str = "logits") -> Entry:
    build = partial(_build, name, head, inputs)
    return Entry("transformers", name, build, build, outputs)


def _build(name: str, head: str, inputs: Callable[[Any], dict[str, Tensor]]) -> Built:
    declare_missing_operators()
    import transformers

    logging.getLogger("transformers").setLevel(logging.CRITICAL)  # remarks on token ids that a tiny vocabulary lacks
    config = tiny(name)
    maker = getattr(transformers, head)
    model: nn.Module = maker.from_config(config) if head.startswith("Auto") else maker(config)
    return model, (), inputs(model.config)


def tiny(name: str) -> Any:
    """A configuration of a few thousand weights; sizes are multiples of 4, keys and values have fewer heads where they can."""
    import transformers

    kind = transformers.CONFIG_MAPPING[name]
    own, special = vars(kind()), dict(SPECIAL.get(name, {}))
    if name in PAIRS.split():
        special |= {"text_config": _TOWERS | {"vocab_size": WORDS, "max_position_embeddings": 64, "eos_token_id": 2},
                    "vision_config": _TOWERS | {"image_size": 32, "patch_size": 8}}  # fmt: skip
    if special.get("use_timm_backbone") is False:
        special["backbone_config"] = transformers.ResNetConfig(**_CONVS, out_features=["stage2"])
    renamed = getattr(kind, "attribute_map", {})
    sizes = {key: size for key, size in TINY.items() if key not in renamed and isinstance(own.get(key, ""), int | None)}
    return kind(**sizes | special)


def _masks() -> dict[str, Tensor]:
    return {
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "decoder_attention_mask": torch.ones(2, 8, dtype=torch.int64),
    }


def _ids() -> Tensor:
    return torch.randint(3, WORDS - 2, (2, LENGTH))


def _words(config: Any) -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _images(config: Any) -> dict[str, Tensor]:
    size = getattr(config, "image_size", 64)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(2, 3, height, width)}


def _spectra(config: Any) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins)}


def _pair(config: Any) -> dict[str, Tensor]:
    return _words(config) | _images(config.vision_config)


def _speech(config: Any) -> dict[str, Tensor]:
    frames = 2 * config.max_source_positions  # whisper pads or cuts what it hears to its own length
    bins = getattr(config, "num_mel_bins", 0)
    features = torch.randn(2, bins, frames) if bins else torch.randn(2, 32, config.input_feat_per_channel)
    return {"input_features": features, "decoder_input_ids": _ids()}
