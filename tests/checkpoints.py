"""Small checkpoint folders as Hugging Face writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def layers(count: int, *, width: int = 64, hidden: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Tensor]]:
    """A shard a layer: two linears and a norm each, an embedding in the first, a head in the last."""
    made = []
    for index in range(count):
        at = f"model.layers.{index}"
        made.append({
            f"{at}.mlp.up_proj.weight": torch.randn(hidden, width, dtype=dtype),
            f"{at}.mlp.down_proj.weight": torch.randn(width, hidden, dtype=dtype),
            f"{at}.mlp.down_proj.bias": torch.randn(width, dtype=dtype),
            f"{at}.input_layernorm.weight": torch.ones(width, dtype=dtype),
        })  # fmt: skip
    made[0]["model.embed_tokens.weight"] = torch.randn(20, width, dtype=dtype)
    made[-1]["lm_head.weight"] = torch.randn(20, width, dtype=dtype)
    return made


def write_folder(path: Path, shards: list[dict[str, Tensor]], config: Mapping[str, Any] | None = None) -> Path:
    """A folder with an index where there are several shards, a config and a tokenizer."""
    path.mkdir(parents=True)
    where: dict[str, str] = {}
    for index, tensors in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, path / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text(json.dumps(config or {}))
    (path / "tokenizer.json").write_text("{}")
    return path


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}
