"""Which files are looked through for doctests: those that hold one. Importing all others takes seconds in every worker."""

from __future__ import annotations

from pathlib import Path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """True for a module that has neither tests nor doctests; None leaves the decision to pytest."""
    path = collection_path
    if path.suffix != ".py" or path.name.startswith("test_") or path.name == "conftest.py":
        return None
    return None if ">>>" in path.read_text(encoding="utf-8") else True
