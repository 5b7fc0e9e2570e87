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
        said = "; ".join(_difference(key, before.get(key), settings[key]) for key in differing)
        raise NMError(f"{out} holds another run of prune: {said}. Give the same options again, or a new folder")
    return dict(journal)


def _difference(key: str, before: Any, now: Any) -> str:
    """How a setting was and is; of weights, of which there may be hundreds, the first that differs."""
    if key == "source":
        return "the checkpoint has changed or is another one"
    if key != "weights" or not isinstance(before, Mapping):
        return f"{key} was {before}, now {now}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    was, will = (
        "dense" if one is None else "{} along axis {}".format(*one) for one in (before.get(names[0]), now.get(names[0]))
    )
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} was {was}, now {will}{more}"


def write_journal(out: Path, journal: Mapping[str, Any]) -> None:
    """Put it in its place, whole. Raises NMError."""
    with whole(out / JOURNAL) as file:
        file.write((json.dumps(journal, indent=1) + "\n").encode())
