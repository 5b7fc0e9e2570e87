"""The tensors of whatever `nm.verify` is given, by name: a module, a state_dict, a file or a folder of files."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nm_compiler.carrier import carrier_of
from nm_compiler.errors import NMError
from nm_compiler.runtime.lowered import Lowered
from nm_compiler.runtime.quantized_graphs import without_floats
from nm_compiler.state.beside import of_another
from nm_compiler.wording import first_line

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def tensors_of(target: nn.Module | Mapping[str, Any] | str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and values; those of .safetensors files one after the other, so that no two are in memory. Raises NMError."""
    if isinstance(target, nn.Module):
        yield from _of_module(target).items()
    elif isinstance(target, (str, Path)):
        yield from _of_path(Path(target))
    else:
        yield from _of_mapping(target, type(target).__name__)


def masked_elsewhere(target: Any) -> list[str]:
    """Names of weights that are dense in ``target``, since it is a part of a compiled model, which has their masks."""
    if not isinstance(target, nn.Module):
        return []
    return of_another(target, [path for path, module in target.named_modules() if _masks_of(module)])


def _masks_of(module: nn.Module) -> Any:
    """What gives the weights of a compiled model as its masks leave them; None of any other module."""
    return getattr(carrier_of(module) or module, "masked_parameters", None)


def _of_path(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.is_dir():
        from nm_compiler.streaming.folder import read_folder

        for shard in read_folder(path).shards:
            yield from _one_by_one(shard.path)
    elif not path.is_file():
        raise NMError(f"{path}: no such file")
    elif path.suffix == ".safetensors":
        yield from _one_by_one(path)
    else:
        yield from _of_mapping(_unpickled(path), str(path))


def _one_by_one(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            for name in names:
                yield name, file.get_tensor(name)
    except Exception as error:
        raise _unreadable(path, error) from error
    if not names:
        raise _no_state_dict(str(path))


def _unpickled(path: Path) -> Any:
    if path.suffix not in _PICKLED:
        kind = path.suffix or "a file without a suffix"
        raise NMError(f"{path}: verify reads .safetensors, .onnx, .pt, .pth, .bin and .ckpt, not {kind}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error


def _of_module(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, Lowered):
        raise NMError(
            f"this {model.title} is lowered to {model.backend}, and holds weights as its kernels read them: verify the model "
            "that was lowered; nm.report(...) of this one says what runs sparse"
        )
    found = {name: _plain(parameter.detach()) for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        masked = _masks_of(module)
        if masked:  # a compiled model, here or inside: its weights as their masks leave them
            prefix = f"{path}." if path else ""
            found = {name: value for name, value in found.items() if not name.startswith(prefix)}
            found |= {prefix + name: value for name, value in masked().items()}
    for path, module in model.named_modules():
        if isinstance(module, Lowered):  # a part by itself: packed weights are named, not looked at
            found |= {f"{path}.{name}": value for name, value in module.state_dict().items()}
    order = {name: at for at, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    found = without_floats(model, found | _packed_in(model))
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _of_mapping(values: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Those of a state_dict, or of the first one that lies in what a training script has saved."""
    if isinstance(values, Mapping) and not _holds_tensors(values):
        values = next((each for each in values.values() if isinstance(each, Mapping) and _holds_tensors(each)), values)
    if not isinstance(values, Mapping) or not _holds_tensors(values):
        raise _no_state_dict(where)
    for name, value in values.items():
        if isinstance(_plain(value), Tensor):
            yield str(name), _plain(value).detach()


def _holds_tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _plain(value: Any) -> Any:
    """The weight that torch.ao or torchao has quantised, alone or beside its bias, as numbers: its zeros are exact."""
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor) and value[0].is_quantized:
        value = value[0]
    if not isinstance(value, Tensor):
        return value
    of_its_own = type(value).dequantize is not Tensor.dequantize  # as torchao's, which are classes of tensors
    return value.dequantize() if value.is_quantized or of_its_own else value


def _packed_in(model: nn.Module) -> dict[str, Tensor]:
    """Weights of layers that torch.ao has quantised: no parameters, but what a method called ``weight`` gives."""
    layers = {path: module for path, module in model.named_modules() if inspect.ismethod(getattr(module, "weight", None))}
    weights = {f"{path}.weight" if path else "weight": layer.weight() for path, layer in layers.items()}
    return {name: _plain(weight) for name, weight in weights.items() if isinstance(weight, Tensor) and weight.is_quantized}


def _no_state_dict(where: str) -> NMError:
    return NMError(f"{where} holds no state_dict: pass a module, a mapping of names to tensors, or a checkpoint file")


def _unreadable(path: Path, error: Exception) -> NMError:
    if "Unsupported global" in str(error):
        return NMError(
            f"{path} holds more than tensors, such as a whole model, and verify runs no code out of a file: save "
            "model.state_dict(), or pass what torch.load(path, weights_only=False) gives if you trust the file"
        )
    if not path.stat().st_size:
        return NMError(f"{path} is empty: save it again, as model.state_dict()")
    first = first_line(error).partition(". ")[0].rstrip(".")
    return NMError(
        f"{path} ({path.stat().st_size} bytes) cannot be read: {first}. The file is truncated, damaged or holds more than "
        "tensors: save it again, as model.state_dict()"
    )
