"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.sharding import is_sharded


def save_checkpoint(path: str | Path, **parts: Any) -> None:
    """``nm.save_checkpoint("run.pt", model=sparse, optimizer=optimizer, scheduler=scheduler, epoch=3)``.

    parts: whatever has a ``state_dict()`` is saved as that, the rest (numbers, tensors, dicts) as it is. Every rank of a
    distributed training may call it; rank 0 writes. The file is written beside its place, flushed to the disk and then put
    there in one step: a process that dies, or a disk that fills up, leaves the old checkpoint as it was.
    Raises NMError, the old file intact, if it cannot be written, and for a model in shards.
    """
    file = Path(path)
    for name, part in parts.items():
        cut = next((n for n, p in part.named_parameters() if is_sharded(p)), None) if isinstance(part, nn.Module) else None
        if cut is not None:
            raise NMError(
                f"{file} would hold the shards of one rank: {cut} of {name}= is in shards. Save with "
                "torch.distributed.checkpoint, which writes those of all ranks"
            )
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    half = file.with_name(f".{file.name}.{os.getpid()}.half")
    try:
        with half.open("wb") as out:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())
        half.replace(file)
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError where a write fails
        kept = "the checkpoint that was there is intact" if file.exists() else "nothing was left behind"
        raise NMError(f"{file} could not be written ({error}): {kept}; free some space or give another path") from error
    finally:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, *, map_location: Any = "cpu", **parts: Any) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote into ``parts``, by the same names; returns what was saved besides them.

    path: of the file; map_location: as for `torch.load`.
    parts: objects with ``load_state_dict``. Schedules are loaded first and models last, so that a checkpoint of another
    method, pattern or schedule changes nothing: what was loaded before it is put back.
    Raises NMError if the file cannot be read, lacks a part, or does not fit.
    """
    file = Path(path)
    try:
        saved = torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise NMError(f"{file} is not there") from error
    except Exception as error:
        raise NMError(
            f"{file} cannot be read as a checkpoint ({type(error).__name__}: {error}): it is damaged, or another"
        ) from error
    missing = sorted(set(parts) - set(saved)) if isinstance(saved, Mapping) else sorted(parts)
    if missing:
        raise NMError(f"{file} has no {', '.join(missing)}; it holds {', '.join(sorted(saved)) or 'nothing'}")
    undo: list[tuple[Any, Any]] = []
    for name in sorted(parts, key=lambda name: _weight(parts[name])):
        part = parts[name]
        before = copy.deepcopy(part.state_dict()) if isinstance(part, nn.Module) else part.state_dict()
        undo.append((part, before))
        try:
            part.load_state_dict(saved[name])
        except Exception as error:
            for other, state in reversed(undo):
                other.load_state_dict(state)
            if isinstance(error, NMError):
                raise
            raise NMError(f"{name} of {file} does not fit, nothing was loaded: {error}") from error
    return {name: value for name, value in saved.items() if name not in parts}


def _weight(part: Any) -> int:
    """What is cheap to put back comes first."""
    return 2 if isinstance(part, nn.Module) else int(isinstance(part, torch.optim.Optimizer))
