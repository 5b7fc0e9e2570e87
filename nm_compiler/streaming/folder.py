"""A checkpoint folder as Hugging Face writes it, looked at as a whole before anything is done with it.

model.safetensors, or model-00001-of-0000N.safetensors with model.safetensors.index.json; config.json, tokenizer files.
Libraries beside transformers call the same files after something else (diffusion_pytorch_model.safetensors): where nothing
is called model, the only one of its kind is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nm_compiler.errors import NMError
from nm_compiler.streaming.tensor_file import Entry, TensorFile, read_tensor_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INDICES = ".safetensors.index.json"
_OURS = ("nm_prune.json", "nm_orders.st")  # of a run of prune that wrote this folder
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class Folder:
    """A checkpoint whose every tensor is where it should be.

    shards: its files, by name; index: of several shards; beside: small files that belong to it (config,
    tokenizer); left: what else lies there and is not part of it (folders, weights in other formats).
    """

    path: Path
    shards: tuple[TensorFile, ...]
    index: Path | None
    beside: tuple[Path, ...]
    left: tuple[Path, ...]

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @property
    def homes(self) -> dict[str, TensorFile]:
        """The shard of every tensor."""
        return {entry.name: shard for shard in self.shards for entry in shard.entries}

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    def config(self) -> Mapping[str, Any]:
        """config.json, empty where there is none. Raises NMError if it cannot be read."""
        found = _json(self.path / "config.json") if (self.path / "config.json").is_file() else {}
        return found if isinstance(found, dict) else {}


def read_folder(path: Path) -> Folder:
    """Look at a checkpoint. Raises NMError that names the file: missing or damaged shards, tensors missing or listed twice."""
    if not path.is_dir():
        raise NMError(f"{path}: no such folder; prune takes a checkpoint folder with {SINGLE}, or shards and {INDEX}")
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise NMError(f"{path} holds {SINGLE} and {INDEX}, so that every tensor may be listed twice: remove one of them")
    if not single.exists() and not index.exists():
        found = _called_otherwise(path)
        single, index = (path, found) if found.name.endswith(_INDICES) else (found, path / INDEX)
    shards = _indexed(index) if index.exists() else (read_tensor_file(single),)
    used = {shard.path.name for shard in shards} | {index.name}
    others = sorted(each for each in path.iterdir() if each.name not in used)
    beside = tuple(each for each in others if each.is_file() and not each.name.endswith(_WEIGHTS) and each.name not in _OURS)
    return Folder(path, shards, index if index.exists() else None, beside, tuple(set(others) - set(beside)))


def _called_otherwise(path: Path) -> Path:
    """The index or the file of a checkpoint that is not called model. Raises NMError if there is none, or a choice."""
    files = sorted(each for each in path.iterdir() if each.name.endswith((_INDICES, ".safetensors")))
    found = [each for each in files if each.name.endswith(_INDICES)] or files
    if not found:
        there = ", ".join(sorted(each.name for each in path.iterdir())[:6]) or "nothing"
        raise NMError(f"{path} holds neither {SINGLE} nor {INDEX}; it holds {there}. Save the model as safetensors first")
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:6])
        raise NMError(
            f"{path} holds {names}, and neither {SINGLE} nor an index that says what belongs together: leave one of them "
            "there, or save the model again"
        )
    return found[0]


def _indexed(index: Path) -> tuple[TensorFile, ...]:
    listed = _json(index)
    where = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise NMError(f"{index} has no weight_map from tensors to files: download it again")
    names = sorted(set(where.values()))
    odd = next((name for name in names if Path(name).name != name or not name.endswith(".safetensors")), None)
    if odd is not None:
        raise NMError(f"{index} names {odd!r}, which is no .safetensors file of the same folder")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise NMError(f"{index.parent} lacks {len(absent)} of {len(names)} shards, {absent[0]} first: download it again")
    shards, home = tuple(read_tensor_file(index.parent / name) for name in names), dict[str, str]()
    for shard in shards:
        for entry in shard.entries:
            if entry.name in home:
                raise NMError(f"{entry.name} is listed twice, in {home[entry.name]} and in {shard.path.name}: remove one")
            home[entry.name] = shard.path.name
    for name in {**where, **home}:
        if where.get(name) != home.get(name):
            said, found = where.get(name, "no file"), home.get(name, "none")
            raise NMError(f"{index} puts {name} in {said}, it lies in {found}: save the checkpoint again")
    return shards


def _json(path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise NMError(f"{path} lists {name!r} twice: save the checkpoint again")
            result[name] = value
        return result

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError) as error:
        raise NMError(f"{path} cannot be read: {error}") from error
