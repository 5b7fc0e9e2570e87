"""Fixtures: golden files, a fixed seed; which tests run everywhere, in CI or by hand (--ci, --slow); --update-golden."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from unmeasured import unmeasured

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # its disk cache does not see changes in an op's backward
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its pool of processes would import torch once more for one small kernel
torch.set_num_threads(1)  # tiny tensors: a second thread only waits
gc.set_threshold(20_000, 20, 20)  # tracing makes many objects that live: looking for garbage less often is a twentieth faster

# pytest listens to every logger that does not propagate. torch writes megabytes to this one as soon as it has a listener.
logging.getLogger("torch.__trace").handlers.clear()
logging.getLogger("torch.__trace").propagate = True

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt; read the diff afterwards")
    parser.addoption("--ci", action="store_true", help="run the tests marked ci as well, as CI does (NM_CI=1)")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well, and those marked ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow")
    ci = slow or config.getoption("--ci") or bool(os.environ.get("NM_CI"))
    for item in items:
        if "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        left = item.get_closest_marker("ci")
        if left and not ci and not any(part in item.name for part in left.kwargs.get("here", ())):
            item.add_marker(pytest.mark.skip(reason="takes seconds, left to CI: run with --ci"))
    if not any("::" in argument for argument in config.args):
        _check_here(items)


def _check_here(items: list[pytest.Item]) -> None:
    """Every part in a `here` names a case; else a renamed case would run in CI alone, and nobody would know."""
    cases: dict[tuple[str, str], list[str]] = {}
    for item in items:
        left, none = item.get_closest_marker("ci"), item.get_closest_marker("skip")
        if none and str(none.kwargs.get("reason", "")).startswith("got empty parameter set"):  # what this machine lacks
            continue
        if left and "here" in left.kwargs:
            where = item.nodeid.partition("[")[0]
            for part in left.kwargs["here"]:
                cases.setdefault((where, part), []).append(item.name)
    lost = [key for key, names in cases.items() if not any(key[1] in name for name in names)]
    if lost:
        named = "; ".join(f"{where} has no case {part!r}" for where, part in lost)
        raise pytest.UsageError(f"marks ci(here=...) name cases that are not there: {named}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI (NM_CI=1) a test marked ``required`` may not be skipped, unless it is slow: those are run by hand."""
    report = yield
    needed = item.get_closest_marker("required") and (item.config.getoption("--slow") or not item.get_closest_marker("slow"))
    if report.skipped and os.environ.get("NM_CI") and needed:
        report.outcome, report.longrepr = "failed", f"required, but skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _unmeasured() -> None:
    unmeasured()


@pytest.fixture(autouse=True)
def _imports_are_not_garbage() -> Generator[None]:
    """Collections, automatic ones too, need not look again at what was there before the test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def threads() -> Generator[Callable[[int], None]]:
    """Set how many threads torch has in a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _choices_of_ones_own(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """What other processes measured on this machine decides nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NM_COMPILER_CACHE", str(tmp_path_factory.mktemp("choices")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with tests/golden/<name>.txt, or rewrite it under --update-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text + "\n")
            return
        assert path.exists(), f"{path.name} is missing: run pytest --update-golden and read what it wrote"
        assert text + "\n" == path.read_text(), f"{path.name} differs: pytest --update-golden, then read the diff"

    assert not (os.environ.get("CI") and request.config.getoption("--update-golden")), "goldens are not written in CI"
    return check


@pytest.fixture(scope="module")
def transformers() -> Any:
    """Hugging Face's library, importable beside a torch for CPUs; the test is skipped where it is not installed."""
    zoo = pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'")
    zoo.declare_missing_operators()
    return pytest.importorskip("transformers", exc_type=ImportError)
