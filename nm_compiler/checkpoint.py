"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_compiler.errors import NMError
from nm_compiler.state.sharding import is_sharded


def save_checkpoint(path: str | Path, **parts: Any) -> None:
    """``nm.save_checkpoint("run.pt", model=sparse, optimizer=optimizer, scheduler=scheduler, epoch=3)``.

    parts: whatever has a ``state_dict()`` is saved as that, the rest (numbers, tensors, dicts) as it is. Every rank of a
    distributed training may call it; rank 0 writes. The file is written beside its place, flushed to the disk and then put
    there in one step: a process that dies, or a disk that fills up, leaves the old checkpoint as it was.
    Raises NMError, the old file intact, if it cannot be written, for a model in shards, and for what could not be loaded:
    files are read without running code of theirs, so a NumPy number or an object of a class of one's own is refused here.
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
    for name, value in state.items():
        _check_readable(file, name, value)
    half = file.with_name(f".{file.name}.{os.getpid()}.half")
    try:
        with half.open("wb") as out:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())
        half.replace(file)
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError where a write fails
        if isinstance(error.__context__, KeyboardInterrupt):  # or was interrupted
            raise error.__context__ from None
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


def _check_readable(file: Path, name: str, value: Any) -> None:
    """Raise NMError if `load_checkpoint` could not read ``value``. Looks at all but tensors, so it costs next to nothing."""
    bare = pytree.tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, value)
    if _is_readable(bare):
        return
    wrong = next((leaf for leaf in pytree.tree_leaves(bare) if not _is_readable(leaf)), bare)
    kind = f"{type(wrong).__module__}.{type(wrong).__qualname__}"
    raise NMError(
        f"{file} was not written: {name}= holds a {kind}, which could not be loaded again, as a checkpoint is read without "
        "running code. Save numbers, strings, tensors, and lists or dicts of them: float(x), x.tolist(), vars(x), str(x)"
    )


def _is_readable(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever pickle and the classes of others raise
        return False
    return True


def _weight(part: Any) -> int:
    """What is cheap to put back comes first."""
    return 2 if isinstance(part, nn.Module) else int(isinstance(part, torch.optim.Optimizer))
