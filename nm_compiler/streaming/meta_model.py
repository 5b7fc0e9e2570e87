"""The model that a checkpoint folder describes, built without values from config.json, where transformers knows it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nm_compiler.wording import first_line


def meta_model(folder: Path, config: Mapping[str, Any]) -> nn.Module | str:
    """The model of ``config["architectures"]`` on the meta device, in evaluation mode; or why there is none, in words.

    Nothing is downloaded and no code of the folder is run.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        return "config.json names no architecture" if config else "config.json is missing or empty"
    if importlib.util.find_spec("transformers") is None:
        return f"{name} needs transformers to be built (pip install 'nm_compiler[hf]')"
    try:
        import transformers

        maker = getattr(transformers, name, None)
        if maker is None:
            return f"transformers has no {name}"
        settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = maker._from_config(settings) if hasattr(maker, "_from_config") else maker(settings)
    except Exception as error:
        return f"{name} cannot be built from config.json ({first_line(error)})"
    return model.eval() if isinstance(model, nn.Module) else f"{name} is no model"
