"""nm_prune.json: what a run was asked for and what came of it, so that a killed run goes on and another one is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nm_compiler.errors import NMError
from nm_compiler.streaming.folder import Folder
from nm_compiler.streaming.whole import HALF, whole

JOURNAL = "nm_prune.json"


def fingerprint(folder: Folder) -> dict[str, str]:
    """By shard: a digest of its header, size and time. Not of its tensors, which would take as long as pruning."""
    found = {}
    for shard in folder.shards:
        stat = shard.path.stat()
        text = f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(shard.header).hexdigest()}"
        found[shard.path.name] = hashlib.sha256(text.encode()).hexdigest()[:32]
    return found


def digest(path: Path) -> str:
    """A digest of a small file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def read_journal(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The journal of a run that can go on in ``out``; None where there is nothing yet.

    Raises NMError for a folder that holds something else, or a run with other settings or of another checkpoint.
    """
    if out.exists() and not out.is_dir():
        raise NMError(f"{out} is a file: give a folder to write the pruned checkpoint to")
    there = [each.name for each in out.iterdir() if not each.name.endswith(HALF)] if out.exists() else []
    if not there:
        return None
    if JOURNAL not in there:
        shown = ", ".join(sorted(there)[:4])
        raise NMError(f"{out} is not empty ({shown}) and holds no run of prune that could go on: give a new folder")
    try:
        journal = json.loads((out / JOURNAL).read_text(encoding="utf-8"))
        before = journal["settings"]
        differing = [key for key in settings if before.get(key) != settings[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NMError(f"{out / JOURNAL} cannot be read ({error}): remove {out}, or give a new folder") from error
    if differing:
        said = "; ".join(
            "the checkpoint has changed or is another one" if key == "source" else f"{key} was {before.get(key)}, "
            f"now {settings[key]}" for key in differing
        )  # fmt: skip
        raise NMError(f"{out} holds another run of prune: {said}. Give the same options again, or a new folder")
    return dict(journal)


def write_journal(out: Path, journal: Mapping[str, Any]) -> None:
    """Put it in its place, whole. Raises NMError."""
    with whole(out / JOURNAL) as file:
        file.write((json.dumps(journal, indent=1) + "\n").encode())
